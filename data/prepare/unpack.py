"""Unpack gzip, xz and zip files once, into the cache."""

import gzip
import logging
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from data.prepare.files import create, sha256_of

CHUNK = 1 << 20  # bytes

log = logging.getLogger(__name__)


@contextmanager
def _open_zip(path: Path) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        files = [member for member in archive.infolist() if not member.is_dir()]
        if len(files) != 1:
            raise ValueError(
                f"{path} must hold one file, it holds {len(files)}: unpack it, and give the file "
                f"to be read with data.path=FILE."
            )
        with archive.open(files[0]) as file:
            yield file


FORMATS = {  # suffix: (first bytes, how to open)
    ".gz": (b"\x1f\x8b", gzip.open),
    ".xz": (b"\xfd7zXZ\x00", lzma.open),
    ".zip": (b"PK\x03\x04", _open_zip),
}
UNPACKING_ERRORS = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    RuntimeError,  # of zipfile: encrypted, or a compression that Python lacks
)


def unpacked(path: Path, cache: Path) -> Path:
    """Where the content of ``path`` lies without compression.

    That is ``path`` itself if it is not compressed; otherwise a file in ``cache`` whose name has
    the SHA-256 of ``path``, written by the first call.

    Raises:
        ValueError: if ``path`` is damaged, or a zip of more than one file.
        OSError: if ``path`` cannot be read or the disk is full.
    """
    if _opener(path) is None:
        return path
    target = cache / "unpacked" / f"{path.stem}-{sha256_of(path)}"
    return create(target, partial(unpack, path))


def unpack(path: Path, target: Path) -> None:
    """Write the content of the compressed file ``path`` to ``target``, or nothing if it fails."""
    log.info("unpacking %s to %s", path, target.parent)
    try:
        with _opener(path)(path) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, UNPACKING_ERRORS):
            raise ValueError(
                f"{path} cannot be unpacked ({error}); get it again, or unpack it by other means."
            ) from error
        raise


def _opener(path: Path) -> Callable[[Path], IO[bytes]] | None:
    """The function that opens ``path`` for reading its content, None if it is not compressed."""
    with open(path, "rb") as file:
        head = file.read(6)
    for magic, opener in FORMATS.values():
        if head.startswith(magic):
            return opener
    if path.suffix.lower() in FORMATS:
        raise ValueError(
            f"{path} is not a {path.suffix} file, it begins with {head!r}: get it again, or rename "
            f"it if its content is meant to be read as it is."
        )
    return None
