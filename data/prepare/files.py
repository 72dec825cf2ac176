"""Files that appear whole or not at all, even if processes race or die or the disk is full."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def create(target: Path, write: Callable[[Path], None]) -> Path:
    """Make ``target`` exist: ``write`` fills a part file, which is synced and then renamed.

    One process writes, others that want the same file wait for it. A part file that an interrupted
    ``write`` leaves behind is handed to the next one, which may continue it.

    Raises:
        OSError: if the disk is full; whatever ``write`` raises.
    """
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(target.with_name(f".{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():  # nobody wrote it while this process waited for the lock
                write(part)
                sync(part)
                part.replace(target)
                sync(target.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(target.parent).free
        raise OSError(
            f"no space left to write {target}, {free:,} bytes are free there; "
            f"free some, or choose another folder with paths.cache."
        ) from error
    return target


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; reads it in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
