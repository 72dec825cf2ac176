"""Byte files and the bundled sample: what is read, how it is split, what is refused."""

import gzip
import hashlib
import lzma
import shutil
import zipfile

import numpy as np
import pytest
from hydra import compose, initialize
from hydra.utils import instantiate

from data.corpora.byte_file import SAMPLE, ByteFile, Sample

FRACTIONS = [0.9, 0.05, 0.05]
TEXT = np.random.default_rng(0).integers(256, size=10_000, dtype=np.uint8).tobytes()


def pack(folder, suffix, content=TEXT):
    path = folder / f"text{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("text", content)
    else:
        compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
        path.write_bytes(compress(content))
    return path


def prepared(path, cache, fractions=FRACTIONS):
    corpus = ByteFile(str(path), str(cache), fractions=fractions)
    corpus.prepare()
    return corpus


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zip"])
def test_a_compressed_file_gives_the_same_splits_as_the_raw_one(suffix, tmp_path):
    splits = prepared(pack(tmp_path, suffix), tmp_path / "cache").open()
    assert {name: len(tokens) for name, tokens in splits.items()} == {
        "train": 9_000,
        "validation": 500,
        "test": 500,
    }
    assert all(isinstance(split.tokens, np.memmap) for split in splits.values())
    assert b"".join(split.tokens.tobytes() for split in splits.values()) == TEXT


def test_compression_is_recognised_without_a_suffix(tmp_path):
    path = pack(tmp_path, ".xz").rename(tmp_path / "text")
    assert prepared(path, tmp_path / "cache").open()["train"].tokens.tobytes() == TEXT[:9_000]


def test_a_raw_file_is_read_where_it_is(tmp_path):
    assert prepared(pack(tmp_path, ""), tmp_path / "cache").raw == tmp_path / "text"
    assert not (tmp_path / "cache").exists()


def test_a_compressed_file_is_unpacked_once_for_each_content(tmp_path):
    cache = tmp_path / "cache"
    first = prepared(pack(tmp_path, ".gz"), cache).raw
    written = first.stat().st_mtime_ns
    assert prepared(tmp_path / "text.gz", cache).raw == first
    assert first.stat().st_mtime_ns == written
    assert prepared(pack(tmp_path, ".gz", b"other" * 100), cache).raw != first


def test_an_interrupted_unpacking_leaves_nothing_that_loads(tmp_path, monkeypatch):
    def stop_midway(source, file, size):
        file.write(source.read(100))
        raise KeyboardInterrupt

    path, cache = pack(tmp_path, ".xz"), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", stop_midway)
        with pytest.raises(KeyboardInterrupt):
            prepared(path, cache)
    assert not list((cache / "unpacked").glob("text*"))
    assert prepared(path, cache).raw.read_bytes() == TEXT


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zip"])
def test_a_truncated_archive_is_refused_and_leaves_nothing(suffix, tmp_path):
    path = pack(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=rf"text{suffix} cannot be unpacked .* get it again"):
        prepared(path, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "unpacked").glob("text*"))


def test_a_suffix_that_promises_compression_is_held_to_it(tmp_path):
    path = tmp_path / "text.xz"
    path.write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"is not a \.xz file, it begins with b'versio'"):
        prepared(path, tmp_path)


def test_a_zip_of_several_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a", TEXT)
        archive.writestr("b", TEXT)
    with pytest.raises(ValueError, match="must hold one file, it holds 2"):
        prepared(tmp_path / "two.zip", tmp_path)


@pytest.mark.parametrize("fractions", [[0.9, 0.05, 0.04], [0.5, 0.5], [1.1, -0.05, -0.05]])
def test_fractions_must_be_three_positive_shares_of_the_file(fractions, tmp_path):
    with pytest.raises(ValueError, match=r"data\.corpus\.fractions must be .* got \["):
        ByteFile("text", str(tmp_path), fractions=fractions)


def test_a_missing_or_empty_or_absent_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a file; correct data\.path"):
        prepared(tmp_path / "nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        prepared(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="text is empty"):
        prepared(pack(tmp_path, "", b""), tmp_path)
    with pytest.raises(ValueError, match=r"give it with data\.path=FILE"):
        ByteFile(None, str(tmp_path), fractions=FRACTIONS).prepare()


def test_the_bundled_sample_is_the_file_that_its_readme_describes(tmp_path):
    sample = Sample(None, str(tmp_path), fractions=FRACTIONS)
    sample.prepare()
    content = b"".join(split.tokens.tobytes() for split in sample.open().values())
    readme = SAMPLE.with_name("README.md").read_text()
    assert len(content) == 4_154_399
    assert hashlib.sha256(content).hexdigest() in readme
    assert hashlib.sha256(SAMPLE.read_bytes()).hexdigest() in readme
    assert content.startswith(b"<mediawiki xmlns=")


def test_the_sample_takes_no_other_file(tmp_path):
    with pytest.raises(ValueError, match=r"use data=bytes data\.path=mine"):
        Sample("mine", str(tmp_path), fractions=FRACTIONS)


@pytest.mark.parametrize("name", ["enwik8", "bytes", "sample"])
def test_every_corpus_composes_and_instantiates(name, tmp_path):
    overrides = [f"+data={name}", "+seed=1", f"+paths.cache={tmp_path}"]
    with initialize(version_base="1.3", config_path="../../../conf"):
        config = compose(overrides=overrides)
    assert instantiate(config.data).length == config.data.length


def test_the_sample_trains_and_validates_on_a_fresh_clone(tmp_path):
    with initialize(version_base="1.3", config_path="../../../conf"):
        config = compose(overrides=["+data=sample", "+seed=1", f"+paths.cache={tmp_path}"])
    data = instantiate(config.data)
    data.prepare_data()
    assert len(data.split("train")) == round(4_154_399 * 0.9)
    assert len(data.split("validation")) >= 65_536
