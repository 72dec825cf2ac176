"""Text of one's own and text8: how they are cut, and what is refused."""

import gzip
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler

import numpy as np
import pytest

from data.corpora import SPLITS, text8
from data.corpora.text import Text
from data.corpora.text8 import Text8
from tests.support.serving import serving

FRACTIONS = [0.5, 0.25, 0.25]


def prepared(path, cache, tokenizer="bytes", vocab_size=256, fractions=FRACTIONS):
    corpus = Text(
        str(path), str(cache), fractions=fractions, tokenizer=tokenizer, vocab_size=vocab_size,
        vocab_sizes={"bytes": 256, "sentencepiece": 16384},
    )  # fmt: skip
    corpus.prepare()
    return corpus


def texts(corpus):
    return {
        name: [
            corpus.vocabulary.decode(split.tokens[start:end]).decode()
            for start, end in zip(split.starts, split.ends, strict=True)
        ]
        for name, split in corpus.open().items()
    }


def test_the_files_of_a_folder_are_documents_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "notes"
    (folder / "b").mkdir(parents=True)
    for name in ("1.txt", "2.txt", "b/3.txt"):
        (folder / name).write_text(name)
    (folder / "b" / "4.txt.gz").write_bytes(gzip.compress(b"packed"))
    corpus = prepared(folder, tmp_path / "cache")
    assert texts(corpus) == {"train": ["1.txt", "2.txt"], "validation": ["b/3.txt"],
                             "test": ["packed"]}  # fmt: skip


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 256), ("sentencepiece", 272)])
def test_one_file_is_cut_in_three_between_characters(tmp_path, tokenizer, size):
    content = "é" * 11 + "日本" * 7 + "\U0001f600" * 5
    (tmp_path / "text").write_text(content)
    parts = texts(prepared(tmp_path / "text", tmp_path / "cache", tokenizer, size))
    assert "".join(part for name in SPLITS for part in parts[name]) == content
    assert [len(parts[name]) for name in SPLITS] == [1, 1, 1]


def test_changed_text_is_prepared_anew(tmp_path):
    (tmp_path / "text").write_text("one two three four")
    prepared(tmp_path / "text", tmp_path / "cache")
    (tmp_path / "text").write_text("five six seven")
    parts = texts(prepared(tmp_path / "text", tmp_path / "cache"))
    assert "".join(part for name in SPLITS for part in parts[name]) == "five six seven"


def test_text_that_is_not_there_or_too_short_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere; correct data\.path"):
        prepared(tmp_path / "nowhere", tmp_path)
    (tmp_path / "short").write_text("ab")
    with pytest.raises(ValueError, match="short has 2 bytes, too few for three splits"):
        prepared(tmp_path / "short", tmp_path)
    (tmp_path / "few").mkdir()
    with pytest.raises(ValueError, match=r"at least 3 files .* got 0"):
        prepared(tmp_path / "few", tmp_path)


@pytest.fixture
def small_text8(monkeypatch):
    monkeypatch.setattr(text8, "CHARACTERS", 1000)
    monkeypatch.setattr(text8, "CUTS", (900, 950))


def test_text8_has_27_symbols_and_its_own_split(tmp_path, small_text8):
    content = (b"anarchism originated as a term " * 40)[:1000]
    (tmp_path / "text8").write_bytes(content)
    corpus = Text8(str(tmp_path / "text8"), str(tmp_path / "cache"))
    corpus.prepare()
    splits = corpus.open()
    assert [len(splits[name]) for name in SPLITS] == [900, 50, 50]
    assert corpus.vocab_size == 27
    assert np.array_equal(corpus.units, np.ones(27))
    assert b"".join(corpus.vocabulary.decode(splits[n].tokens) for n in SPLITS) == content
    assert corpus.vocabulary.decode(corpus.vocabulary.encode("The year 1900!")) == b"the year "


@pytest.mark.parametrize("content", [b"abc " * 100, b"Abc " * 250])
def test_a_file_that_is_not_text8_is_refused(tmp_path, small_text8, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=rf"is not text8, it has {len(content):,} bytes .*=bytes"):
        Text8(str(tmp_path / "file"), str(tmp_path)).prepare()


def test_text8_is_downloaded_and_a_damaged_archive_is_not_kept(tmp_path, small_text8, monkeypatch):
    web = tmp_path / "web"
    web.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(partial(SimpleHTTPRequestHandler, directory=web)) as server:
        monkeypatch.setattr(text8, "URL", f"http://127.0.0.1:{server.server_port}/text8.zip")
        (web / "text8.zip").write_text("please log in")
        with pytest.raises(ValueError, match=r"text8\.zip is not a \.zip file"):
            Text8(None, str(tmp_path)).prepare()
        with zipfile.ZipFile(web / "text8.zip", "w") as archive:
            archive.writestr("text8", b"the cat sat " * 83 + b"cats")
        corpus = Text8(None, str(tmp_path))
        corpus.prepare()
    assert [len(corpus.open()[name]) for name in SPLITS] == [900, 50, 50]
    assert [path.name for path in (tmp_path / "text8").glob("text8*")] == ["text8"]
