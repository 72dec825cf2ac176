"""Documents as tokens on disk: written once, in parallel, and continued where it was cut off."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.corpora import Split
from data.prepare.files import create, sync
from data.prepare.vocabulary import Vocabulary

BATCH = 1 << 25  # bytes of documents between two notes of what is finished


@dataclass(frozen=True)
class Document:
    """A part of a file of text: bytes ``start`` to ``end``, None is the end of the file."""

    name: str
    path: Path
    start: int = 0
    end: int | None = None

    @property
    def size(self) -> int:
        end = self.path.stat().st_size if self.end is None else self.end
        return end - self.start

    def read(self) -> bytes:
        """The bytes as they are on disk."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)

    def text(self) -> str:
        r"""The text, with ``\n`` for the line ends ``\r\n``.

        Raises:
            ValueError: if it is empty or not UTF-8.
        """
        content = self.read()
        if not content:
            raise ValueError(f"{self.path} is empty; remove it, or get it again.")
        try:
            return content.decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is not UTF-8, byte {self.start + error.start:,} is "
                f"0x{content[error.start]:02x}; convert the file, or get it again."
            ) from error


def parallel() -> ThreadPoolExecutor:
    """A thread for each core: reading, hashing and sentencepiece leave Python to the others."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def prepare(documents: Sequence[Document], vocabulary: Vocabulary, target: Path) -> None:
    """Make the folder ``target`` hold the documents' tokens, unless it is there.

    The folder appears when it is complete. A process that is killed leaves another one beside it,
    which the next one goes on with.

    Raises:
        ValueError: if a document is empty, is not UTF-8, or does not come back from its tokens.
        OSError: if the disk is full.
    """
    create(target, partial(_write, documents, vocabulary))


def open_prepared(folder: Path, vocabulary: Vocabulary, note: str | None) -> Split:
    """Map what `prepare` wrote.

    Raises:
        ValueError: if the files do not fit together.
    """
    bounds = np.load(folder / "bounds.npy")
    tokens = np.memmap(folder / "tokens", dtype=_dtype(vocabulary), mode="r")
    if len(tokens) != bounds[-1]:
        raise ValueError(
            f"{folder} is damaged, it has {len(tokens):,} tokens instead of {bounds[-1]:,}; delete "
            f"it, and it will be made again."
        )
    return Split(tokens, bounds[:-1], note)


def _write(documents: Sequence[Document], vocabulary: Vocabulary, part: Path) -> None:
    part.mkdir(exist_ok=True)
    finished, counts = part / "finished", []  # tokens of each document that is in `tokens`
    if finished.exists():  # a last line that was cut off does not count
        lines = finished.read_text().splitlines(keepends=True)
        counts = [int(line) for line in lines if line.endswith("\n")]
    dtype = _dtype(vocabulary)
    sizes = [document.size for document in documents]
    progress = tqdm(
        desc=f"preparing {part.stem}",
        initial=sum(sizes[: len(counts)]),
        total=sum(sizes),
        unit="B",
        unit_scale=True,
        disable=None,
    )
    with progress, open(part / "tokens", "ab") as tokens, open(finished, "a") as notes:
        tokens.truncate(sum(counts) * dtype.itemsize)
        with parallel() as pool:
            for batch in _batches(documents, sizes, len(counts)):
                for document, made in zip(
                    batch, pool.map(partial(_tokens, vocabulary, dtype), batch), strict=True
                ):
                    tokens.write(made)
                    counts.append(len(made))
                    progress.update(document.size)
                _flush(tokens)  # before the note that says so
                notes.writelines(f"{count}\n" for count in counts[-len(batch) :])
                _flush(notes)
    np.save(part / "bounds.npy", np.cumsum([0, *counts], dtype=np.int64))
    sync(part / "bounds.npy")
    finished.unlink()


def _batches(
    documents: Sequence[Document], sizes: Sequence[int], first: int
) -> Iterator[Sequence[Document]]:
    """The documents from number ``first`` on, in lists of about `BATCH` bytes."""
    while first < len(documents):
        end, size = first, 0
        while end < len(documents) and size < BATCH:
            size += sizes[end]
            end += 1
        yield documents[first:end]
        first = end


def _tokens(vocabulary: Vocabulary, dtype: np.dtype, document: Document) -> np.ndarray:
    text = document.text()
    tokens = vocabulary.encode(text).astype(dtype)
    if vocabulary.decode(tokens) != text.encode():
        raise ValueError(
            f"the tokenizer {vocabulary.file} does not give back the text of {document.path}; use "
            f"one that is trained without normalisation, with data.tokenizer=sentencepiece."
        )
    return tokens


def _dtype(vocabulary: Vocabulary) -> np.dtype:
    return np.min_scalar_type(len(vocabulary) - 1)


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
