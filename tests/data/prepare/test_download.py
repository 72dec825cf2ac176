"""Downloads against a server on this machine that cuts, lies and fails."""

import errno
import hashlib
from http.server import BaseHTTPRequestHandler
from multiprocessing import get_context

import pytest

from data.prepare.download import fetch
from data.prepare.files import create
from tests.support.serving import serving

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers["Range"]
        server.ranges_asked.append(asked)
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        start = start if server.knows_ranges else 0
        if start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else len(server.content)
        self.wfile.write(server.content[start : start + cut])
        return None

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Handler) as server:
        server.content, server.knows_ranges = CONTENT, True
        server.statuses, server.cuts, server.ranges_asked = [], [], []
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        yield server


def get(server, target, **options):
    return fetch(server.url, target, sha256=SHA256, wait=0, **options)


def test_a_download_has_the_content_and_leaves_no_part_file(server, tmp_path):
    target = get(server, tmp_path / "new" / "file")
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.glob("*[!k]")] == ["file"]


def test_a_file_that_is_there_is_not_downloaded_again(server, tmp_path):
    get(server, tmp_path / "file")
    get(server, tmp_path / "file")
    assert len(server.ranges_asked) == 1


def test_a_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    server.cuts = [100_000, 50_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges_asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_process_continues_an_interrupted_download(server, tmp_path):
    server.cuts = [100_000]
    with pytest.raises(ConnectionError, match=r"closed after 100,000 of 256,000 bytes"):
        get(server, tmp_path / "file", attempts=1)
    assert not (tmp_path / "file").exists()
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges_asked[1] == "bytes=100000-"


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    server.knows_ranges, server.cuts = False, [100_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


def test_a_complete_part_file_only_needs_its_name(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


def test_wrong_content_is_deleted_and_the_message_has_both_checksums(server, tmp_path):
    server.content = b"please log in"
    actual = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(ValueError, match=f"{actual} instead of {SHA256}"):
        get(server, tmp_path / "file")
    assert not list(tmp_path.glob("file*"))


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(server, tmp_path):
    server.statuses = [503, 500]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    server.statuses = [404, 404]
    with pytest.raises(ConnectionError, match="the server answered 404"):
        get(server, tmp_path / "other")
    assert server.statuses == [404]


def test_no_network_is_one_sentence_with_the_address(tmp_path):
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/file could not be downloaded"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file", sha256=SHA256, wait=0)


def test_a_full_disk_is_one_sentence_with_the_remedy(tmp_path):
    def write(part):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"no space left to write .*file.*paths\.cache"):
        create(tmp_path / "file", write)


def test_processes_that_need_the_same_file_write_it_once(tmp_path):
    fork = get_context("fork")
    processes = [fork.Process(target=_create_and_note, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "notes").read_text() == "written\n"


def _create_and_note(folder):
    def write(part):
        part.write_bytes(CONTENT)
        with open(folder / "notes", "a") as notes:
            notes.write("written\n")

    assert create(folder / "file", write).read_bytes() == CONTENT
