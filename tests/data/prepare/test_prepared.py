"""Documents to tokens: exact, resumable, and never a cache that loads when it is incomplete."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.prepare import prepared
from data.prepare.prepared import Document, open_prepared, prepare
from data.prepare.subwords import Subwords, train_subwords
from data.prepare.vocabulary import Bytes
from tests.support.commands import ROOT

TEXTS = ["One fish.\r\nTwo fish.\r\n", "Red fish ▁ é\n", " x \n\n"]


def files(folder, texts=TEXTS):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text.encode())
    return [Document(str(n), folder / f"{n}.txt") for n in range(len(texts))]


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    model = tmp_path_factory.mktemp("subwords") / "model"
    train_subwords(["one fish, two fish, red fish, blue fish"] * 20, 300, model)
    return Subwords(model)


@pytest.fixture(params=["bytes", "subwords"])
def vocabulary(request):
    return Bytes() if request.param == "bytes" else request.getfixturevalue("subwords")


def test_tokens_give_back_each_document_with_its_line_ends_made_one(tmp_path, vocabulary):
    documents = files(tmp_path / "books")
    prepare(documents, vocabulary, tmp_path / "made")
    split = open_prepared(tmp_path / "made", vocabulary, "a note")
    assert isinstance(split.tokens, np.memmap)
    assert split.note == "a note"
    for text, start, end in zip(TEXTS, split.starts, split.ends, strict=True):
        expected = text.replace("\r\n", "\n").encode()
        assert vocabulary.decode(split.tokens[start:end]) == expected
        assert vocabulary.units[split.tokens[start:end]].sum() == len(expected)


@given(st.text(st.characters(codec="utf-8")))
def test_subwords_lose_nothing_of_any_text(subwords, text):
    tokens = subwords.encode(text)
    assert subwords.decode(tokens) == text.encode()
    assert subwords.units[tokens].sum() == len(text.encode())


def test_training_subwords_twice_gives_the_same_model(tmp_path):
    for name in ("a", "b"):
        train_subwords(["one fish, two fish, red fish, blue fish"] * 20, 300, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("size", [100, 5000])
def test_a_vocabulary_that_the_text_does_not_allow_is_one_sentence(tmp_path, size):
    with pytest.raises(ValueError, match=rf"data\.vocab_size={size} subwords .*choose another"):
        train_subwords(["one fish, two fish"] * 20, size, tmp_path / "model")
    assert not (tmp_path / "model").exists()


KILLED = """
import os, sys, pathlib
from data.prepare import prepared
from data.prepare.vocabulary import Bytes
from tests.data.prepare.test_prepared import many

class Slow(Bytes):
    def encode(self, text):
        if text.startswith("30 "):
            print("waiting", flush=True)
            import time; time.sleep(100)
        return super().encode(text)

prepared.BATCH = 100
folder = pathlib.Path(sys.argv[1])
prepared.prepare(many(folder), Slow(), folder / "made")
"""


def many(folder):
    return files(folder / "books", [f"{n} fish\n" * 20 for n in range(60)])


def test_a_killed_preparation_leaves_no_cache_and_is_continued(tmp_path, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waiting\n"
    finished = tmp_path / "made.part" / "finished"
    end = time.monotonic() + 60
    while len(finished.read_text().splitlines()) < 29 and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "made").exists()
    done = len(finished.read_text().splitlines())
    assert done >= 29
    with open(tmp_path / "made.part" / "tokens", "ab") as tokens:
        tokens.write(b"written, but not noted")
    encoded = []

    class Counting(Bytes):
        def encode(self, text):
            encoded.append(text)
            return super().encode(text)

    documents = many(tmp_path)
    prepare(documents, Counting(), tmp_path / "made")
    assert len(encoded) == 60 - done
    split = open_prepared(tmp_path / "made", Bytes(), None)
    assert split.tokens.tobytes() == b"".join(document.read() for document in documents)
    assert len(split.starts) == 60


def test_a_cache_that_was_cut_off_is_refused(tmp_path):
    prepare(files(tmp_path / "books"), Bytes(), tmp_path / "made")
    with open(tmp_path / "made" / "tokens", "r+b") as tokens:
        tokens.truncate(5)
    with pytest.raises(ValueError, match="damaged, it has 5 tokens instead of"):
        open_prepared(tmp_path / "made", Bytes(), None)


def test_a_full_disk_is_one_sentence_and_leaves_no_cache(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepared, "_flush", full)
    with pytest.raises(OSError, match=r"no space left to write .*made.*paths\.cache"):
        prepare(files(tmp_path / "books"), Bytes(), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"1\.txt is empty"), (b"caf\xe9 au lait", r"1\.txt is not UTF-8, byte 3 is 0xe9")],
)
def test_a_file_that_is_no_text_is_named(tmp_path, content, message):
    documents = files(tmp_path / "books")
    documents[1].path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(documents, Bytes(), tmp_path / "made")
    assert not (tmp_path / "made").exists()
