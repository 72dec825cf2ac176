"""Any file as a corpus of bytes, split by fractions; and the sample that comes with Strider."""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from data.corpora import SPLITS, Corpus, Split, stream
from data.corpora.fractions import check_fractions, cuts
from data.prepare.unpack import unpacked
from data.prepare.vocabulary import Bytes

SAMPLE = Path(__file__).parents[1] / "samples" / "enwik8-prefix.xz"

log = logging.getLogger(__name__)


class ByteFile(Corpus):
    """A file whose bytes are the tokens: the first part trains, the last two are held out.

    Args:
        path: the file, as it is or compressed (gzip, xz, or zip of one file).
        cache: folder for what is unpacked.
        fractions: shares of train, validation and test, in this order.

    Raises:
        ValueError: if the fractions are not three positive numbers with sum 1.
    """

    vocabulary = Bytes()

    def __init__(self, path: str | None, cache: str, *, fractions: Sequence[float]):
        check_fractions(fractions)
        self.path = None if path is None else Path(path).expanduser()
        self.cache = Path(cache).expanduser()
        self.fractions = fractions

    def prepare(self) -> None:
        """Check the file, and unpack it if it is compressed; for one process of each machine.

        Raises:
            ValueError: if no file is given, or it is empty or damaged.
            OSError: if it cannot be read, or unpacked for want of space.
        """
        if self.path is None:
            raise ValueError(
                "data=bytes needs a file to train on: give it with data.path=FILE (raw, .gz, .xz "
                "or .zip)."
            )
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file; correct data.path.")
        if self.raw.stat().st_size == 0:
            raise ValueError(f"{self.path} is empty; give another file with data.path=FILE.")
        sizes = ", ".join(f"{len(tokens):,} {name}" for name, tokens in self.open().items())
        log.info("reading %s: %s bytes", self.path, sizes)

    def open(self) -> dict[str, Split]:
        tokens = np.memmap(self.raw, dtype=np.uint8, mode="r")
        parts = np.split(tokens, cuts(len(tokens), self.fractions))
        return dict(zip(SPLITS, map(stream, parts), strict=True))

    @cached_property
    def raw(self) -> Path:
        """The file that is mapped into memory: ``path``, or its content in the cache."""
        return unpacked(self.path, self.cache)


class Sample(ByteFile):
    """The beginning of enwik8 that comes with Strider (``data/samples/README.md``)."""

    def __init__(self, path: None, cache: str, *, fractions: Sequence[float]):
        if path is not None:
            raise ValueError(
                f"data=sample reads the file that comes with Strider, got data.path={path}; "
                f"use data=bytes data.path={path} for another one."
            )
        super().__init__(str(SAMPLE), cache, fractions=fractions)
