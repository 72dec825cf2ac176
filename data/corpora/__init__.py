"""What a corpus is: three splits of tokens in mapped memory, and where their documents start."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from data.prepare.vocabulary import Vocabulary

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Documents laid end to end.

    Args:
        tokens: ``(N,)`` token ids, unsigned integers, usually memory-mapped.
        starts: ``(documents,)`` int64, the first token of each document, ascending from 0; one
            stream without borders has ``[0]``.
        note: what a report must say about it, such as "99 of 100 books"; None if it is complete.
    """

    tokens: np.ndarray
    starts: np.ndarray
    note: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ends(self) -> np.ndarray:
        """One past the last token of each document, ``(documents,)``."""
        return np.append(self.starts[1:], len(self.tokens))

    def first(self, tokens: int | None) -> "Split":
        """The part of the first ``tokens`` tokens; None is all."""
        if tokens is None or tokens >= len(self):
            return self
        return replace(self, tokens=self.tokens[:tokens], starts=self.starts[self.starts < tokens])

    def without_borders(self) -> "Split":
        """The same tokens as one document."""
        return replace(self, starts=np.zeros(1, dtype=np.int64))


def stream(tokens: np.ndarray, note: str | None = None) -> Split:
    """A split that is one text without borders."""
    return Split(tokens, np.zeros(1, dtype=np.int64), note)


class Corpus(ABC):
    """Made with ``(path, cache, *, own keyword arguments)``; `prepare` comes before all else.

    ``measure`` names, in `evaluation.measures`, the unit in which results are reported, and
    ``vocabulary`` turns tokens into text and back, for corpora of text; ``image_shape`` is rows,
    columns and channels, for corpora of images, each of which is a document in raster order.
    """

    measure = "bits_per_byte"
    vocabulary: Vocabulary | None = None
    image_shape: tuple[int, int, int] | None = None

    @abstractmethod
    def prepare(self) -> None:
        """Download, check and tokenise, once on each machine; processes may do so side by side.

        Raises:
            ValueError, OSError: if the corpus cannot be had, or is not what it should be.
        """

    @abstractmethod
    def open(self) -> dict[str, Split]:
        """The splits by name (`SPLITS`); only maps files into memory."""

    def words(self, tokens: np.ndarray) -> int | None:
        """Words of a part of one document, for word-level results; None where none are reported."""
        return None

    @property
    def units(self) -> np.ndarray:
        """Bytes (or dimensions) that each token stands for, ``(vocab_size,)`` int64."""
        return self.vocabulary.units

    @property
    def vocab_size(self) -> int:
        return len(self.units)
