"""Download a file: resumed where it was cut off, verified, and named only when complete."""

import hashlib
import http.client
import logging
import ssl
import time
import urllib.error
import urllib.request
from functools import partial
from http import HTTPStatus
from pathlib import Path

from tqdm import tqdm

from data.prepare.files import create
from data.prepare.unpack import unpack

NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
)
CHUNK = 1 << 20  # bytes

log = logging.getLogger(__name__)


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None,
    attempts: int = 4,
    wait: float = 0.5,
    timeout: float = 15,
) -> Path:
    """Put the content of ``url`` at ``target``, unless it is there already.

    Args:
        sha256: SHA-256 of the content, in hexadecimal; None: the caller checks the content.
        attempts: how often to try; each continues where the one before it was cut off, also one
            of an earlier process.
        wait: seconds before the second attempt, twice as long before each further one.
        timeout: seconds of silence after which an attempt has failed.

    Raises:
        ConnectionError: if the network or the server fails in every attempt.
        ValueError: if the content has another SHA-256; it is then deleted.
        OSError: if the disk is full.
    """

    def write(part: Path) -> None:
        download(url, part, attempts=attempts, wait=wait, timeout=timeout)
        if sha256 is not None:
            check(url, part, "sha256", sha256)

    return create(target, write)


def fetch_unpacked(name: str, url: str, target: Path, *, sha256: str | None) -> None:
    """Put the one file of the zip at ``url`` at ``target``, unless it is there already.

    Args:
        name: what an error calls the file.
        sha256: of the zip; None: the caller checks the file.

    Raises:
        FileNotFoundError: if the network or the server fails; says where the file may be put.
        ValueError: if the zip has another SHA-256, or is damaged; it is then deleted.
        OSError: if the disk is full.
    """
    archive = target.with_name(f"{name}.zip")
    try:
        fetch(url, archive, sha256=sha256)
    except ConnectionError as error:
        raise FileNotFoundError(
            f"there is no {name} at {target}, and {error}; put the file there, or say where it is "
            f"with data.path=FILE (raw, .gz, .xz or .zip)."
        ) from error
    try:
        create(target, partial(unpack, archive))
    except ValueError:
        archive.unlink()  # so that the next run gets another one
        raise
    archive.unlink(missing_ok=True)  # the unpacked file is all that is read from now on


def check(url: str, part: Path, algorithm: str, expected: str) -> None:
    """Compare the checksum of what ``url`` gave; a file with another one is deleted.

    Raises:
        ValueError: if they differ.
    """
    with open(part, "rb") as file:
        actual = hashlib.file_digest(file, algorithm).hexdigest()
    if actual != expected:
        part.unlink()
        name = {"sha256": "SHA-256", "md5": "MD5"}[algorithm]
        raise ValueError(
            f"{url} gave a file with {name} {actual} instead of {expected}, so it was deleted; "
            f"try again, or get the file elsewhere."
        )


def download(
    url: str,
    part: Path,
    *,
    attempts: int = 4,
    wait: float = 0.5,
    timeout: float = 15,
    progress: bool = True,
) -> None:
    """Complete the file ``part`` with the content of ``url``, unchecked; see `fetch`.

    Args:
        progress: show a bar on a terminal.
    """
    for attempt in range(1, attempts + 1):
        try:
            _receive(url, part, timeout, progress)
            break
        except NETWORK_ERRORS as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or attempt == attempts:
                raise ConnectionError(
                    f"{url} could not be downloaded ({_reason(error)})"
                ) from error
            log.warning("%s: %s; attempt %d follows", url, _reason(error), attempt + 1)
            time.sleep(wait * 2 ** (attempt - 1))


def _receive(url: str, part: Path, timeout: float, progress: bool) -> None:
    """Append to ``part`` what it lacks, in one request."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if start and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing follows `start`: the part is complete, or its checksum will be wrong
        raise
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            start = 0  # a server without ranges sends everything again
        length = response.headers["Content-Length"]
        total = None if length is None else start + int(length)
        hidden = None if progress else True  # None: hidden unless there is a terminal
        bar = tqdm(
            desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=hidden
        )
        with bar, open(part, "ab" if start else "wb") as file:
            while chunk := response.read1(CHUNK):  # what has come, to lose little when cut off
                file.write(chunk)
                bar.update(len(chunk))
    # http.client ends a body that was cut off like one that is complete.
    size = part.stat().st_size
    if total is not None and size < total:
        raise ConnectionError(f"the connection closed after {size:,} of {total:,} bytes")


def _reason(error: Exception) -> str:
    """What went wrong, without urllib's wrapping."""
    reason = getattr(error, "reason", error)
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {reason}"
    return str(reason) or type(error).__name__
