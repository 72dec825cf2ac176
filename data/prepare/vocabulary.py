"""Vocabularies of text: every token stands for fixed bytes, so that any text has exact counts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np


class Vocabulary(ABC):
    """Text to tokens and back without loss.

    Args:
        pieces: the bytes of each token.
        file: what the vocabulary was read from; None if it needs no file.
    """

    def __init__(self, pieces: Sequence[bytes], file: Path | None = None):
        self.pieces, self.file = list(pieces), file

    def __len__(self) -> int:
        return len(self.pieces)

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids ``(N,)`` of a text, such that ``decode(encode(text)) == text.encode()``."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that token ids stand for."""
        return b"".join(map(self.pieces.__getitem__, np.asarray(tokens).tolist()))

    @cached_property
    def units(self) -> np.ndarray:
        """Bytes of each token, ``(vocab_size,)`` int64."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)


class Bytes(Vocabulary):
    """A token is a byte of UTF-8."""

    def __init__(self):
        super().__init__([bytes([value]) for value in range(256)])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        return np.asarray(tokens, dtype=np.uint8).tobytes()
