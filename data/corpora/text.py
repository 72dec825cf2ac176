"""Text of one's own: a file or a folder of files, each a document, as bytes or subwords."""

import hashlib
import itertools
import json
import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.corpora import SPLITS, Corpus, Split
from data.corpora.fractions import check_fractions, cuts
from data.prepare.files import create, sha256_of
from data.prepare.prepared import Document, open_prepared, parallel, prepare
from data.prepare.subwords import Subwords, train_subwords
from data.prepare.unpack import FORMATS, unpacked
from data.prepare.vocabulary import Bytes

FORMAT = 1  # of what `data.prepare.prepared` writes: another number makes caches anew
TRAINING_BYTES = 1 << 26  # of text that subwords are trained on, at most

log = logging.getLogger(__name__)


class Documents(Corpus):
    """Documents of text, tokenised once and kept in the cache under a hash of their content.

    Results are also reported a word: a word is a `str.split()` item.

    Args:
        path: where the corpus is; None: see the subclass.
        cache: folder for what is made.
        tokenizer: ``"bytes"``, ``"sentencepiece"`` (trained on the training split), or the path of
            a sentencepiece model.
        vocab_size: how many different tokens sentencepiece shall make.
        vocab_sizes: those of each tokenizer by name, where no other is asked for.

    Raises:
        ValueError: if there is no such tokenizer.
    """

    def __init__(
        self,
        path: str | None,
        cache: str,
        *,
        tokenizer: str | None = None,
        vocab_size: int = 0,
        vocab_sizes: Mapping[str, int],
    ):
        if tokenizer not in vocab_sizes and not Path(str(tokenizer)).is_file():
            raise ValueError(
                f"data.tokenizer must be {', '.join(vocab_sizes)} or a file of sentencepiece, got "
                f"{'null' if tokenizer is None else tokenizer}."
            )
        if vocab_size < 1:
            raise ValueError(
                f"data.vocab_size must be the number of tokens in {tokenizer}, got {vocab_size}."
            )
        self.path, self.cache = path, Path(cache).expanduser()
        self.tokenizer, self._vocab_size = tokenizer, vocab_size
        self._prepared: dict[str, tuple[Path, str | None]] = {}

    @abstractmethod
    def documents(self) -> dict[str, list[Document]]:
        """Those of each split, after they have been fetched; raises ValueError and OSError."""

    def note(self, split: str, digests: Mapping[str, str]) -> str | None:
        """What reports must say about a split whose documents have these SHA-256, by name."""
        return None

    def prepare(self) -> None:
        documents = self.documents()
        digests = {name: _digests(documents[name], name) for name in SPLITS}
        self.vocabulary = self._make_vocabulary(documents["train"], digests["train"])
        file = self.vocabulary.file
        made_by = self.tokenizer if file is None else sha256_of(file)
        for name in SPLITS:
            key = _key([FORMAT, made_by, list(digests[name].values())])
            folder = self.cache / "prepared" / f"{name}-{key}"
            prepare(documents[name], self.vocabulary, folder)
            self._prepared[name] = folder, self.note(name, digests[name])
        for name, split in self.open().items():
            count = f"{len(split.starts):,} documents, {len(split):,} tokens"
            log.info("%s: %s%s", name, count, f" ({split.note})" if split.note else "")

    def open(self) -> dict[str, Split]:
        return {
            name: open_prepared(folder, self.vocabulary, note)
            for name, (folder, note) in self._prepared.items()
        }

    def words(self, tokens: np.ndarray) -> int:
        text = self.vocabulary.decode(tokens)
        return len(text.decode(errors="ignore").split())  # a part may begin within a character

    def _make_vocabulary(
        self, training: Sequence[Document], digests: Mapping[str, str]
    ) -> Bytes | Subwords:
        if self.tokenizer == "bytes":
            return Bytes()
        if self.tokenizer != "sentencepiece":
            return Subwords(Path(self.tokenizer))
        key = _key([FORMAT, self._vocab_size, TRAINING_BYTES, list(digests.values())])
        model = self.cache / "prepared" / f"sentencepiece-{key}.model"
        return Subwords(create(model, partial(self._train, training)))

    def _train(self, training: Sequence[Document], target: Path) -> None:
        log.info("training a vocabulary of %d subwords", self._vocab_size)
        every = math.ceil(sum(document.size for document in training) / TRAINING_BYTES)
        lines = (line for d in training for line in d.text().split("\n")[::every] if line)
        train_subwords(lines, self._vocab_size, target)


class Text(Documents):
    """Files of one's own, UTF-8; what is compressed (gzip, xz, or zip of one file) is unpacked.

    Args:
        path: a folder, whose files (``.txt``, ``.gz``, ``.xz``, ``.zip``) are a document each and
            go to the splits in the order of their names; or one file, which is cut in three.
        fractions: shares of train, validation and test, in this order: of the documents, or of the
            bytes of a single file.
    """

    def __init__(self, path: str | None, cache: str, *, fractions: Sequence[float], **tokenizer):
        super().__init__(path, cache, **tokenizer)
        check_fractions(fractions)
        self.fractions = fractions

    def documents(self) -> dict[str, list[Document]]:
        if self.path is None:
            raise ValueError("data=text needs text: give it with data.path=FILE_OR_FOLDER.")
        path = Path(self.path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}; correct data.path.")
        return self._of_folder(path) if path.is_dir() else self._of_file(path)

    def _of_folder(self, folder: Path) -> dict[str, list[Document]]:
        suffixes = {".txt", *FORMATS}
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        if len(files) < len(SPLITS):
            raise ValueError(
                f"{folder} must have at least 3 files ({', '.join(sorted(suffixes))}), one for "
                f"each split, got {len(files)}; add some, or give one file with data.path=FILE."
            )
        # At least one document for each split.
        first, second = cuts(len(files), self.fractions)
        first = min(max(first, 1), len(files) - 2)
        second = min(max(second, first + 1), len(files) - 1)
        found = [
            Document(str(file.relative_to(folder)), unpacked(file, self.cache)) for file in files
        ]
        return dict(zip(SPLITS, (found[:first], found[first:second], found[second:]), strict=True))

    def _of_file(self, path: Path) -> dict[str, list[Document]]:
        raw = unpacked(path, self.cache)
        size = raw.stat().st_size
        with open(raw, "rb") as file:
            inner = [_whole_character(file, cut) for cut in cuts(size, self.fractions)]
        bounds = [0, *inner, size]
        if len(set(bounds)) < len(bounds):
            raise ValueError(
                f"{path} has {size} bytes, too few for three splits; give a longer text, or other "
                f"data.corpus.fractions than {list(self.fractions)}."
            )
        pairs = zip(SPLITS, itertools.pairwise(bounds), strict=True)
        return {name: [Document(name, raw, *pair)] for name, pair in pairs}


def _whole_character(file, position: int) -> int:
    """The first position from ``position`` on that does not lie inside a UTF-8 character."""
    file.seek(position)
    following = file.read(3)  # a character has at most three bytes that continue it
    inside = [byte & 0xC0 == 0x80 for byte in following]
    return position + (inside.index(False) if False in inside else len(inside))


def _digests(documents: Sequence[Document], split: str) -> dict[str, str]:
    """SHA-256 of each document as it is on disk, by name."""
    bar = partial(tqdm, desc=f"reading {split}", total=len(documents), disable=None, leave=False)
    with parallel() as pool:
        digests = list(bar(pool.map(_sha256, documents)))
    return dict(zip([document.name for document in documents], digests, strict=True))


def _sha256(document: Document) -> str:
    return hashlib.sha256(document.read()).hexdigest()


def _key(content) -> str:
    """Sixteen hexadecimal digits that stand for ``content``."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
