"""PG-19: 28,752 books from Project Gutenberg that were published before 1919.

Source: Rae et al. 2020, arXiv:1911.05507, and https://github.com/google-deepmind/pg19: books in
three official splits. Line ends are made ``\\n``, as the papers' readers do.
"""

import base64
import csv
import json
import lzma
import re
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from data.corpora import SPLITS
from data.corpora.hub import exported, is_data_set
from data.corpora.text import Documents
from data.prepare.download import NETWORK_ERRORS, check, download
from data.prepare.files import create, sha256_of
from data.prepare.prepared import Document, parallel

BOOKS = {"train": 28_602, "validation": 50, "test": 100}
FILES = "https://storage.googleapis.com/deepmind-gutenberg"
LISTING = "https://storage.googleapis.com/storage/v1/b/deepmind-gutenberg/o"
CHECKSUMS = Path(__file__).parent / "pg19_checksums.csv"
SAMPLE = Path(__file__).parents[1] / "samples" / "pg19-books.tar.xz"
OTHER_WAYS = (
    "give a folder of {train,validation,test}/*.txt with data.path=FOLDER, or a data set with "
    "data.path=hf://datasets/NAME"
)


class PG19(Documents):
    """PG-19, whole or in part; reports say how much of it there was.

    Args:
        path: None: the published files, downloaded to the cache (11 GB) and checked. Else a folder
            ``{train,validation,test}/<book id>.txt``, which is taken as it is, or a data set of
            Hugging Face (see `data.corpora.hub`).
        cache: folder for what is downloaded or made.
    """

    def documents(self) -> dict[str, list[Document]]:
        if self.path is None:
            folder = create(self.cache / "pg19", _download)
        elif is_data_set(self.path):
            folder = exported(self.path, self.cache)
        else:
            folder = Path(self.path).expanduser()
        books = {split: _books(folder, split) for split in SPLITS}
        _require_disjoint(folder, books)
        return books

    def note(self, split: str, digests: Mapping[str, str]) -> str | None:
        known = {name: self._official.get((split, name)) for name in digests}
        equal = sum(known[name] == digest for name, digest in digests.items())
        other = sum(d is not None and d != digests[name] for name, d in known.items())
        if len(digests) == BOOKS[split] and not other:
            return None
        return f"{len(digests):,} of {BOOKS[split]:,} books, {equal:,} equal to the official files"

    @cached_property
    def _official(self) -> dict[tuple[str, str], str]:
        """SHA-256 of official files, as far as they are known: all held-out ones, some others."""
        with open(CHECKSUMS, newline="") as file:
            return {(row["split"], row["book_id"]): row["sha256"] for row in csv.DictReader(file)}


class Sample(PG19):
    """Books of PG-19 that come with Strider (``data/samples/README.md``)."""

    def __init__(self, path: None, cache: str, **tokenizer):
        if path is not None:
            raise ValueError(
                f"data=pg19_sample reads the books that come with Strider, got data.path={path}; "
                f"use data=pg19 data.path={path} for others."
            )
        super().__init__(None, cache, **tokenizer)

    def documents(self) -> dict[str, list[Document]]:
        folder = create(self.cache / "unpacked" / f"pg19-{sha256_of(SAMPLE)}", _unpack)
        return {split: _books(folder, split) for split in SPLITS}


def _books(folder: Path, split: str) -> list[Document]:
    """The books of a split, in the order of their numbers."""
    if not (folder / split).is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder / split}; data.path must have the folders "
            f"{', '.join(SPLITS)}, with a file <book id>.txt for each book."
        )
    files = [path for path in (folder / split).iterdir() if not path.name.startswith(".")]
    if not files:
        raise ValueError(f"{folder / split} has no books; put files <book id>.txt there.")
    for file in files:
        if not re.fullmatch(r"\d+\.txt", file.name):
            raise ValueError(
                f"{file} is no book, its name is not <book id>.txt; rename it, or take it away."
            )
    return [Document(f.stem, f) for f in sorted(files, key=lambda file: int(file.stem))]


def _require_disjoint(folder: Path, books: Mapping[str, list[Document]]) -> None:
    names = {split: {book.name for book in books[split]} for split in SPLITS}
    for held_out in ("validation", "test"):
        if twice := names["train"] & names[held_out]:
            raise ValueError(
                f"book {min(twice)} is in train and in {held_out} of {folder}; take it out of one."
            )


def _unpack(part: Path) -> None:
    with lzma.open(SAMPLE) as file, tarfile.open(fileobj=file) as archive:
        archive.extractall(part, filter="data")


def _download(part: Path) -> None:
    """Complete the folder ``part`` with all published files; those that are there are kept."""
    part.mkdir(exist_ok=True)
    try:
        published = [entry for split in SPLITS for entry in _listed(split, part)]
        missing = [entry for entry in published if not (part / entry["name"]).exists()]
        bar = tqdm(total=len(published), initial=len(published) - len(missing), unit=" books",
                   desc="downloading PG-19", disable=None)  # fmt: skip
        with bar, parallel() as pool:
            for _ in pool.map(lambda entry: _download_book(entry, part), missing):
                bar.update()
    except ConnectionError as error:
        raise FileNotFoundError(
            f"PG-19 is not in {part.parent}, and {error}; {OTHER_WAYS}."
        ) from error


def _download_book(entry: Mapping[str, str], part: Path) -> None:
    target = part / entry["name"]
    partial = target.with_suffix(".part")
    url = f"{FILES}/{entry['name']}"
    download(url, partial, progress=False)
    check(url, partial, "md5", base64.b64decode(entry["md5Hash"]).hex())
    partial.rename(target)


def _listed(split: str, part: Path) -> list[dict[str, str]]:
    """What the server says of each file of a split: ``name`` (with the folder), ``md5Hash``."""
    (part / split).mkdir(exist_ok=True)
    entries, page = [], {}
    while page is not None:
        query = {"prefix": f"{split}/", "fields": "items(name,md5Hash),nextPageToken", **page}
        url = f"{LISTING}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=15) as response:
                answer = json.load(response)
        except NETWORK_ERRORS as error:
            reason = getattr(error, "reason", error)
            raise ConnectionError(f"{LISTING} could not be read ({reason})") from error
        entries += [e for e in answer.get("items", []) if e["name"].endswith(".txt")]
        token = answer.get("nextPageToken")
        page = {"pageToken": token} if token else None
    if len(entries) != BOOKS[split]:
        raise ValueError(
            f"{LISTING} lists {len(entries)} books of {split} instead of {BOOKS[split]}; "
            f"{OTHER_WAYS}."
        )
    return entries
