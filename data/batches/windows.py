"""Which tokens a sample holds: a function of the seed and the sample's number alone.

Windows are cut from a *stream* in which the start id stands before every document: token ``t`` of
document ``d`` is item ``t + d + 1``. A row is ``length + 1`` neighbouring items, int64, padded with
-1 past its document (``split``) or past the end. `data.batches.batch` makes inputs and targets of
rows. ``B`` counts rows.
"""

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from data.corpora import Split

PADDING = -1
DOCUMENTS = ("stream", "pack", "split")


class Stream:
    """The items of a split, and the spans of them that windows stay inside.

    Args:
        split: tokens and where their documents start.
        documents: ``"stream"`` ignores documents, so that there is one start id; ``"pack"`` lets
            windows run across documents; ``"split"`` keeps each window inside one.
        start_id: what stands before a document.
    """

    def __init__(self, split: Split, documents: str, start_id: int):
        split = split.without_borders() if documents == "stream" else split
        self.tokens, self.start_id = split.tokens, start_id
        self.borders = split.starts + np.arange(len(split.starts))  # items that are the start id
        if documents == "split":
            self.firsts, self.sizes = self.borders, split.ends - split.starts
        else:
            self.firsts = np.zeros(1, dtype=np.int64)
            self.sizes = np.array([len(split) + len(split.starts) - 1])  # targets: items but one

    @property
    def ends(self) -> np.ndarray:
        """One past the last item of each span."""
        return self.firsts + self.sizes + 1

    def rows(self, places: np.ndarray, length: int) -> np.ndarray:
        """Rows ``(B, length + 1)`` of the items from ``places[:, 0]`` to at most ``[:, 1]``."""
        rows = np.full((len(places), length + 1), PADDING, dtype=np.int64)
        for row, (first, end) in zip(rows, places.tolist(), strict=True):
            items = self._items(first, min(first + length + 1, end))
            row[: len(items)] = items
        return rows

    def _items(self, first: int, end: int) -> np.ndarray:
        before, after = np.searchsorted(self.borders, [first, end])
        tokens = self.tokens[first - before : end - after]
        borders = self.borders[before:after] - first - np.arange(after - before)
        return np.insert(tokens.astype(np.int64), borders, self.start_id)


class TrainingWindows:
    """Endless training samples: every epoch visits every window once, in a random order.

    Sample ``g`` belongs to epoch ``g // windows``. Each epoch lays its windows end to end from its
    own random offset (in each document, where they stay inside one), so that the borders between
    them differ; fewer than ``2 * length`` tokens are left out at each offset. A document that is
    shorter than a window is one padded window. Another version of numpy may draw another order
    (NEP 19). Each phase of a run counts its samples from 0, and has an order of its own.

    Args:
        stream: what the windows are cut from.
        length: tokens in a window.
        seed, phase: of the order.
        key: where the length stands in the configuration, for messages.

    Raises:
        ValueError: if no document has ``length`` tokens.
    """

    def __init__(
        self, stream: Stream, length: int, seed: int, *, phase: int = 0, key: str = "data"
    ):
        longest = stream.sizes.max()
        if longest < length:
            what = "training split" if len(stream.sizes) == 1 else "longest training document"
            raise ValueError(
                f"one window of {key}.length={length} is longer than the {what} of "
                f"{longest:,} tokens; lower {key}.length."
            )
        self.stream, self.length, self.seed, self.phase = stream, length, seed, phase
        # So many fit with any offset.
        self.counts = np.maximum(1, (stream.sizes + 1) // length - 1)
        self.windows = int(self.counts.sum())
        self.epoch, self.places = -1, np.empty((0, 2), dtype=np.int64)

    def place(self, sample: int) -> np.ndarray:
        """The sample's first item, and the end of the span that it lies in: ``(2,)`` int64."""
        epoch, n = divmod(sample, self.windows)
        if epoch != self.epoch:
            self.epoch, self.places = epoch, self._shuffled_places(epoch)
        return self.places[n]

    def _shuffled_places(self, epoch: int) -> np.ndarray:
        # As numpy seeds, a 0 at the end changes nothing: it is the order of a run without phases.
        random = np.random.default_rng([self.seed, epoch, self.phase])
        slack = np.maximum(self.stream.sizes - self.counts * self.length, 0)
        offsets = self.stream.firsts + random.integers(slack + 1)
        spans, numbers = _numbered(self.counts)
        firsts = offsets[spans] + self.length * numbers
        places = np.stack([firsts, self.stream.ends[spans]], axis=1)
        return places[random.permutation(self.windows)]

    def __getitem__(self, samples: Sequence[int]) -> np.ndarray:
        places = np.stack([self.place(sample) for sample in samples])
        return self.stream.rows(places, self.length)


class EvaluationWindows:
    """Windows end to end over all tokens of every span; beyond the last one is only padding."""

    def __init__(self, stream: Stream, length: int):
        self.stream, self.length = stream, length
        spans, numbers = _numbered(-(-stream.sizes // length))
        firsts = stream.firsts[spans] + length * numbers
        self.places = np.stack([firsts, stream.ends[spans]], axis=1)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, windows: Sequence[int]) -> np.ndarray:
        known = self.places[[window for window in windows if window < len(self)]]
        padding = np.zeros((len(windows) - len(known), 2), dtype=np.int64)  # spans without items
        return self.stream.rows(np.concatenate([known, padding]), self.length)


def training_samples(
    steps: range, *, batch: int, rank: int, world_size: int, micro: int
) -> Iterator[range]:
    """Samples of one device's forward passes in these steps: ``micro`` of them in each.

    Step ``s`` takes the ``batch`` samples from ``s * batch`` on; each rank has an equal slice.
    """
    share = batch // world_size
    for step in steps:
        first = step * batch + rank * share
        for start in range(first, first + share, micro):
            yield range(start, start + micro)


def spread(windows: int, kept: int) -> Sequence[int]:
    """Numbers of ``kept`` of so many windows, at even distances; at least one, at most all."""
    kept = min(max(kept, 1), windows)
    return [n * windows // kept for n in range(kept)]


def evaluation_order(
    windows: Sequence[int], *, rank: int, world_size: int, micro: int
) -> list[list[int]]:
    """Windows of one device's forward passes, ``micro`` in each.

    They go to the ranks in turn. All ranks and all passes get equally many, so that none waits for
    another, and compiled models meet one shape; the excess lies past the end and is padding only.
    """
    rounds = -(-len(windows) // (world_size * micro)) * micro
    excess = [sys.maxsize] * (rounds * world_size - len(windows))
    mine = [*windows, *excess][rank::world_size]
    return [mine[first : first + micro] for first in range(0, rounds, micro)]


def _numbered(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[2, 1] -> [0, 0, 1], [0, 1, 0]``: the span of each window, and its number in there."""
    spans = np.repeat(np.arange(len(counts)), counts)
    return spans, np.arange(len(spans)) - (np.cumsum(counts) - counts)[spans]
