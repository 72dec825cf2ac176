"""CIFAR-10: 60,000 colour photographs of 32 x 32 pixels, in bytes.

An image is a document of 3,072 tokens: its rows from the top, in each row the pixels from the left,
of each pixel red, green and blue (Child et al. 2019, arXiv:1904.10509, section 7.1).

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import csv
import hashlib
import logging
import math
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from data.corpora import Corpus, Split
from data.prepare.download import fetch
from data.prepare.files import create, sha256_of
from data.prepare.pickles import read_pickle
from data.prepare.unpack import unpacked

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
FOLDER = "cifar-10-batches-py"  # in the archive
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
ROWS = 10_000  # images of a batch
HELD_OUT = 2_000  # the last rows of data_batch_5: validation
SHAPE = (32, 32, 3)  # rows, columns, channels
DIMS = math.prod(SHAPE)
SAMPLE = Path(__file__).parents[1] / "samples" / "cifar10-64.xz"

log = logging.getLogger(__name__)


class Images(Corpus):
    """Images of one shape, one document each; every byte is a dimension."""

    measure = "bits_per_dim"
    image_shape = SHAPE

    @property
    def units(self) -> np.ndarray:
        return np.ones(256, dtype=np.int64)


class Cifar10(Images):
    """CIFAR-10: 48,000 images for training, 2,000 for validation and 10,000 for the test.

    The sizes are those of Child et al. 2019, who do not say which images they held out. Here it is
    the last 2,000 rows of data_batch_5: the batches are in random order already, and a rule that
    draws nothing is the same for every version of every library.

    Args:
        path: the official archive, or a folder with its six batches, which is taken as it is; None
            takes the archive from the cache, where it is downloaded to if it is not there.
        cache: folder for what is downloaded and prepared.
        exclude_rows: CSV file with columns ``batch`` and ``row``; the rows of ``test_batch`` that
            it names are left out of the test split.
    """

    def __init__(self, path: str | None, cache: str, *, exclude_rows: str | None = None):
        self.cache = Path(cache).expanduser() / "cifar10"
        self.downloads = path is None
        self.path = self.cache / Path(URL).name if path is None else Path(path).expanduser()
        self.exclude_rows = None if exclude_rows is None else Path(exclude_rows).expanduser()

    def prepare(self) -> None:
        """Download if needed, check, and write the images as tokens; once on each machine.

        Raises:
            ValueError: if the archive is not the official one, or a batch is damaged or holds
                anything but 10,000 images of 32 x 32 pixels, or ``exclude_rows`` is not such a
                table.
            OSError: if something cannot be read, downloaded, or written for want of space.
        """
        self._excluded  # noqa: B018 (a mistake in the small file shows before the download)
        if not self.downloads:
            self._check_path()
        create(self._images, self._write)
        if self.downloads:
            self.path.unlink(missing_ok=True)  # the prepared file is all that is read from now on
        sizes = ", ".join(f"{len(s.starts):,} {name}" for name, s in self.open().items())
        log.info("reading %s: %s images", self.path, sizes)

    def open(self) -> dict[str, Split]:
        images = np.memmap(self._images, dtype=np.uint8, mode="r").reshape(-1, DIMS)
        train, validation, test = np.split(images, [5 * ROWS - HELD_OUT, 5 * ROWS])
        official = sum(self._md5[batch] == MD5[batch] for batch in MD5)
        notes = [] if official == 6 else [f"{official} of 6 batches equal the official ones"]
        splits = {"train": _split(train, notes), "validation": _split(validation, notes)}
        if self._excluded:
            test = np.delete(test, self._excluded, axis=0)
            notes = [*notes, f"{len(self._excluded):,} of {ROWS:,} test rows left out"]
        return splits | {"test": _split(test, notes)}

    @property
    def _images(self) -> Path:
        """All images in the order of the batches, prepared: its name depends on their content."""
        content = hashlib.sha256("".join(self._md5.values()).encode()).hexdigest()
        return self.cache / f"images-{content[:16]}"

    @cached_property
    def _md5(self) -> dict[str, str]:
        """MD5 of each batch; those of the archive are known, because its SHA-256 is checked."""
        if not self.path.is_dir():
            return MD5
        digests = {}
        for batch, path in self._batches().items():
            with open(path, "rb") as file:
                digests[batch] = hashlib.file_digest(file, "md5").hexdigest()
        return digests

    def _batches(self) -> dict[str, Path]:
        """The six files in the folder that was given, or in the one below it."""
        below = self.path / FOLDER
        folder = below if below.is_dir() else self.path
        missing = [batch for batch in MD5 if not (folder / batch).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} has no {', '.join(missing)}; give the folder {FOLDER} of CIFAR-10's "
                f"python version with data.path."
            )
        return {batch: folder / batch for batch in MD5}

    def _write(self, target: Path) -> None:
        if self.downloads:
            self._download()
        with open(target, "wb") as out:
            for batch, file in self._files():
                out.write(_tokens(file, f"{batch} of {self.path}"))

    def _files(self) -> Iterator[tuple[str, IO[bytes]]]:
        """The batches by name, in the official order."""
        if self.path.is_dir():
            for batch, path in self._batches().items():
                with open(path, "rb") as file:
                    yield batch, file
        else:
            with tarfile.open(self.path, "r:gz") as archive:
                for batch in MD5:
                    yield batch, archive.extractfile(f"{FOLDER}/{batch}")

    def _check_path(self) -> None:
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist; correct data.path.")
        if self.path.is_file():
            self._check_archive()

    def _check_archive(self) -> None:
        actual = sha256_of(self.path)
        if actual != SHA256:
            raise ValueError(
                f"{self.path} is not the official archive of CIFAR-10, it has SHA-256 {actual} "
                f"instead of {SHA256}; get it again from {URL}, or unpack it and give the folder, "
                f"which is taken as it is."
            )

    def _download(self) -> None:
        try:
            fetch(URL, self.path, sha256=SHA256)
        except ConnectionError as error:
            raise FileNotFoundError(
                f"there is no CIFAR-10 at {self.path}, and {error}; put the archive there, or say "
                f"with data.path where it or its folder {FOLDER} is."
            ) from error
        self._check_archive()  # it may have been put there by hand

    @cached_property
    def _excluded(self) -> list[int]:
        """Rows of the test batch that are left out, ascending."""
        if self.exclude_rows is None:
            return []
        rows = _read_rows(self.exclude_rows)
        test = sorted({row for batch, row in rows if batch == "test_batch"})
        others = sum(batch != "test_batch" for batch, _ in rows)
        if len(test) == ROWS:
            raise ValueError(f"{self.exclude_rows} names every row of test_batch: none is left.")
        log.info(
            "%s: %d test rows are left out, %d rows of training batches are kept all the same",
            self.exclude_rows, len(test), others,
        )  # fmt: skip
        return test


class Cifar10Sample(Images):
    """The first 64 training images of CIFAR-10, which come with Strider."""

    def __init__(self, path: None, cache: str):
        if path is not None:
            raise ValueError(
                f"data=cifar10_sample reads the images that come with Strider, got "
                f"data.path={path}; use data=cifar10 data.path={path} for all of them."
            )
        self.cache = Path(cache).expanduser()

    def prepare(self) -> None:
        log.info("reading %s", unpacked(SAMPLE, self.cache))

    def open(self) -> dict[str, Split]:
        images = np.memmap(unpacked(SAMPLE, self.cache), dtype=np.uint8, mode="r")
        train, validation, test = np.split(images.reshape(-1, DIMS), [48, 56])
        return {"train": _split(train), "validation": _split(validation), "test": _split(test)}


def _tokens(file: IO[bytes], name: str) -> np.ndarray:
    """The images of one batch, ``(ROWS, DIMS)`` uint8, each in raster order."""
    batch = read_pickle(file, name)
    planes = batch.get("data") if isinstance(batch, dict) else None
    rows, columns, channels = SHAPE
    if getattr(planes, "dtype", None) != np.uint8 or planes.shape != (ROWS, DIMS):
        found = f"{planes.dtype} {planes.shape}" if isinstance(planes, np.ndarray) else planes
        raise ValueError(
            f"{name} must hold {ROWS:,} images of {rows} x {columns} pixels, that is uint8 "
            f"{(ROWS, DIMS)} under `data`, got {found}; get CIFAR-10 again."
        )
    planes = planes.reshape(ROWS, channels, rows, columns)
    return planes.transpose(0, 2, 3, 1).reshape(ROWS, DIMS)


def _read_rows(path: Path) -> list[tuple[str, int]]:
    """``(batch, row)`` of every line of a CSV file."""
    rows = []
    with open(path, newline="") as file:
        table = csv.DictReader(file)
        if not {"batch", "row"} <= set(table.fieldnames or ()):
            raise ValueError(
                f"{path} must have the columns batch and row, got {table.fieldnames}; correct "
                f"data.exclude_rows."
            )
        for line in table:
            batch, row = line["batch"], line["row"] or ""
            if batch not in MD5 or not row.isdecimal() or int(row) >= ROWS:
                raise ValueError(
                    f"{path}, line {table.line_num}: there is no row {row!r} of {batch!r}; a batch "
                    f"is one of {', '.join(MD5)}, and a row a number below {ROWS:,}."
                )
            rows.append((batch, int(row)))
    return rows


def _split(images: np.ndarray, notes: list[str] = ()) -> Split:
    starts = np.arange(len(images), dtype=np.int64) * DIMS
    return Split(images.reshape(-1), starts, "; ".join(notes) or None)
