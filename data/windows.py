"""Which tokens a sample holds: a function of the seed and the sample's number alone.

A row is ``length + 1`` tokens, int64: the token before the window (the start id if there is none),
then the window. So its inputs are ``row[:-1]`` and its targets ``row[1:]``. ``B`` counts rows.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

PADDING = -1  # a target that is not scored


def read_rows(tokens: np.ndarray, starts: Sequence[int], length: int, start_id: int) -> np.ndarray:
    """Rows ``(B, length + 1)`` of the windows that begin at ``starts``, padded past the end."""
    rows = np.full((len(starts), length + 1), PADDING, dtype=np.int64)
    for row, start in zip(rows, starts, strict=True):
        if start == 0:
            known = np.append([start_id], tokens[:length])
        else:
            known = tokens[start - 1 : start + length]
        row[: len(known)] = known
    return rows


class TrainingWindows:
    """Endless training samples: every epoch visits every window once, in a random order.

    Sample ``g`` belongs to epoch ``g // windows``. Each epoch lays its windows end to end from its
    own random offset, so that the borders between them differ; fewer than ``2 * length`` tokens are
    left out of it. Another version of numpy may draw another order (NEP 19).

    Raises:
        ValueError: if there are fewer than ``length`` tokens.
    """

    def __init__(self, tokens: np.ndarray, length: int, start_id: int, seed: int):
        if len(tokens) < length:
            raise ValueError(
                f"one window of data.length={length} is longer than the training split of "
                f"{len(tokens):,} tokens; lower data.length."
            )
        self.tokens, self.length, self.start_id, self.seed = tokens, length, start_id, seed
        self.windows = max(1, (len(tokens) + 1) // length - 1)  # these fit with any offset
        self.epoch, self.starts = -1, np.empty(0, dtype=np.int64)

    def start(self, sample: int) -> int:
        """Position of the sample's first token."""
        epoch, n = divmod(sample, self.windows)
        if epoch != self.epoch:
            self.epoch, self.starts = epoch, self._shuffled_starts(epoch)
        return int(self.starts[n])

    def _shuffled_starts(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        slack = len(self.tokens) - self.windows * self.length
        offset = random.integers(slack + 1)
        return offset + self.length * random.permutation(self.windows)

    def __getitem__(self, samples: Sequence[int]) -> np.ndarray:
        starts = [self.start(sample) for sample in samples]
        return read_rows(self.tokens, starts, self.length, self.start_id)


class EvaluationWindows:
    """Windows end to end over all tokens; the last one is padded, and so are those after it."""

    def __init__(self, tokens: np.ndarray, length: int, start_id: int):
        self.tokens, self.length, self.start_id = tokens, length, start_id

    def __getitem__(self, windows: Sequence[int]) -> np.ndarray:
        starts = [window * self.length for window in windows]
        return read_rows(self.tokens, starts, self.length, self.start_id)


def training_samples(
    first_step: int, *, batch: int, rank: int, world_size: int, micro: int
) -> Iterator[range]:
    """Samples of one device's forward passes, for ever: ``micro`` of them in each.

    Step ``s`` takes the ``batch`` samples from ``s * batch`` on; each rank has an equal slice.
    """
    share = batch // world_size
    for step in itertools.count(first_step):
        first = step * batch + rank * share
        for start in range(first, first + share, micro):
            yield range(start, start + micro)


def evaluation_windows(
    tokens: int, length: int, *, rank: int, world_size: int, micro: int
) -> list[range]:
    """Windows of one device's forward passes over ``tokens`` tokens, at most ``micro`` in each.

    Windows go to the ranks in turn. All ranks get equally many, so that none waits for another; the
    excess lies past the end and is padding only.
    """
    windows = -(-tokens // length)
    rounds = -(-windows // world_size)
    mine = range(rank, rounds * world_size, world_size)
    return [mine[first : first + micro] for first in range(0, rounds, micro)]
