"""text8: 100,000,000 characters of Wikipedia reduced to the letters a to z and the space.

Source: Matt Mahoney, http://mattmahoney.net/dc/textdata.html. The usual split: 90 million
characters for training, then 5 million for validation and 5 million for the test.
"""

import re
import string
from functools import partial
from pathlib import Path

import numpy as np

from data.corpora import SPLITS, Corpus, Split, stream
from data.prepare.download import fetch_unpacked
from data.prepare.files import create, sha256_of
from data.prepare.unpack import unpacked
from data.prepare.vocabulary import Vocabulary

URL = "http://mattmahoney.net/dc/text8.zip"
CHARACTERS = 100_000_000
CUTS = (90_000_000, 95_000_000)
ALPHABET = " " + string.ascii_lowercase


class Letters(Vocabulary):
    """A token is a space or one of the letters a to z."""

    def __init__(self):
        super().__init__([letter.encode() for letter in ALPHABET])

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text in the form of text8: small letters, one space for all else."""
        letters = re.sub("[^a-z]+", " ", text.lower())
        return np.array([ALPHABET.index(letter) for letter in letters], dtype=np.uint8)


class Text8(Corpus):
    """text8, and no other file: its size and its alphabet are checked.

    Args:
        path: the file, as it is or compressed; None takes it from the cache, where it is
            downloaded to if it is not there.
        cache: folder for what is downloaded or made.
    """

    vocabulary = Letters()

    def __init__(self, path: str | None, cache: str):
        self.cache = Path(cache).expanduser()
        self.downloads = path is None
        self.path = self.cache / "text8" / "text8" if path is None else Path(path).expanduser()

    def prepare(self) -> None:
        if self.downloads and not self.path.exists():
            fetch_unpacked("text8", URL, self.path, sha256=None)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file; correct data.path.")
        raw = unpacked(self.path, self.cache)
        self._tokens = self.cache / "prepared" / f"text8-{sha256_of(raw)[:16]}"
        create(self._tokens, partial(self._write, raw))

    def open(self) -> dict[str, Split]:
        tokens = np.memmap(self._tokens, dtype=np.uint8, mode="r")
        return dict(zip(SPLITS, map(stream, np.split(tokens, CUTS)), strict=True))

    def _write(self, raw: Path, target: Path) -> None:
        ids = np.full(256, 255, dtype=np.uint8)
        ids[np.frombuffer(ALPHABET.encode(), dtype=np.uint8)] = np.arange(len(ALPHABET))
        content = np.fromfile(raw, dtype=np.uint8)
        tokens = ids[content]
        others = np.unique(content[tokens == 255])
        if len(content) != CHARACTERS or len(others):
            found = f", {len(others)} of them not in a-z and space" if len(others) else ""
            raise ValueError(
                f"{self.path} is not text8, it has {len(content):,} bytes instead of "
                f"{CHARACTERS:,}{found}; train on it with data=bytes data.path={self.path}."
            )
        tokens.tofile(target)
