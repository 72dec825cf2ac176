"""enwik8: only the real file is read, from a path, the cache or a web server."""

import hashlib
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from data.corpora import enwik8
from data.corpora.byte_file import SAMPLE
from data.corpora.enwik8 import Enwik8
from tests.support.serving import serving


def test_enwik8_refuses_its_own_prefix_and_names_the_way_out(tmp_path):
    message = r"4,154,399 bytes instead of 100,000,000 bytes; .*data=bytes data\.path="
    with pytest.raises(ValueError, match=message):
        Enwik8(str(SAMPLE), str(tmp_path)).prepare()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A file of enwik8's size, sparse on disk, with a mark at each end of each split."""
    path = tmp_path_factory.mktemp("enwik8") / "stand-in"
    with open(path, "wb") as file:
        file.truncate(100_000_000)
        for n, position in enumerate((0, 90_000_000, 95_000_000, 100_000_000)):
            file.seek(max(position - 1, 0))
            file.write(bytes([n, n])[: 100_000_000 - file.tell()])
    with open(path, "rb") as file:
        return path, hashlib.file_digest(file, "sha256").hexdigest()


def test_enwik8_refuses_another_file_of_its_size(stand_in, tmp_path):
    path, digest = stand_in
    with pytest.raises(ValueError, match=f"SHA-256 {digest} instead of SHA-256 2b49720e"):
        Enwik8(str(path), str(tmp_path)).prepare()


def test_enwik8_is_split_after_90_and_95_million_bytes(stand_in, tmp_path, monkeypatch):
    path, digest = stand_in
    monkeypatch.setattr(enwik8, "RAW_SHA256", digest)
    corpus = Enwik8(str(path), str(tmp_path))
    corpus.prepare()
    splits = corpus.open()
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [
        90_000_000,
        5_000_000,
        5_000_000,
    ]
    assert [split.tokens[-1] for split in splits.values()] == [1, 2, 3]
    assert [splits[name].tokens[0] for name in ("validation", "test")] == [1, 2]


@pytest.fixture
def mirror(stand_in, tmp_path, monkeypatch):
    """A web server with a zip of the stand-in in place of enwik8's."""
    path, digest = stand_in
    archive = tmp_path / "web" / "enwik8.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.write(path, "enwik8")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(partial(SimpleHTTPRequestHandler, directory=archive.parent)) as server:
        monkeypatch.setattr(enwik8, "URL", f"http://127.0.0.1:{server.server_port}/enwik8.zip")
        monkeypatch.setattr(enwik8, "ZIP_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
        monkeypatch.setattr(enwik8, "RAW_SHA256", digest)
        yield archive


def test_enwik8_is_downloaded_once_and_then_read_from_the_cache(mirror, tmp_path, monkeypatch):
    Enwik8(None, str(tmp_path)).prepare()
    monkeypatch.setattr(enwik8, "URL", "http://127.0.0.1:9/enwik8.zip")
    corpus = Enwik8(None, str(tmp_path))
    corpus.prepare()
    assert len(corpus.open()["train"]) == 90_000_000
    assert [path.name for path in (tmp_path / "enwik8").glob("enwik8*")] == ["enwik8"]


def test_a_damaged_enwik8_in_the_cache_is_noticed(mirror, tmp_path):
    Enwik8(None, str(tmp_path)).prepare()
    with open(tmp_path / "enwik8" / "enwik8", "r+b") as file:
        file.seek(50_000_000)
        file.write(b"\x01")
    with pytest.raises(ValueError, match=r"is not enwik8.* delete it to download it again"):
        Enwik8(None, str(tmp_path)).prepare()


def test_a_wrong_download_of_enwik8_is_not_kept(mirror, tmp_path):
    mirror.write_bytes(mirror.read_bytes()[:-1])
    with pytest.raises(ValueError, match="gave a file with SHA-256"):
        Enwik8(None, str(tmp_path)).prepare()
    assert not list((tmp_path / "enwik8").glob("enwik8*"))


def test_without_file_and_network_enwik8_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(enwik8, "URL", "http://127.0.0.1:9/enwik8.zip")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    place = Path(tmp_path, "enwik8", "enwik8")
    with pytest.raises(FileNotFoundError) as caught:
        Enwik8(None, str(tmp_path)).prepare()
    for part in (f"no enwik8 at {place}", "http://127.0.0.1:9/enwik8.zip", "data.path=FILE"):
        assert part in str(caught.value)
