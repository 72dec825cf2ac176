"""PG-19 from each of its sources, what its reports say, and what is refused."""

import base64
import csv
import hashlib
import json
import urllib.parse
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import datasets
import pytest
from hydra.utils import instantiate
from lightning.pytorch.accelerators import CPUAccelerator

from data.corpora import SPLITS, pg19
from data.corpora.pg19 import CHECKSUMS, PG19, SAMPLE, Sample
from tests.support.configs import composed
from tests.support.serving import serving

SIZES = {"bytes": 256, "sentencepiece": 400}
BOOKS = {
    "train": {"12": "The cat sat.\r\n" * 50, "7": "A dog ran away.\r\n" * 40},
    "validation": {"30": "The dog sat.\r\n"},
    "test": {"41": "A cat ran.\r\nAway!\r\n"},
}


def folder_of(path):
    for split, books in BOOKS.items():
        (path / split).mkdir(parents=True)
        for name, text in books.items():
            (path / split / f"{name}.txt").write_bytes(text.encode())
    return path


def corpus(path, cache, tokenizer="bytes", vocab_size=256, kind=PG19):
    path = None if path is None else str(path)
    return kind(path, str(cache), tokenizer=tokenizer, vocab_size=vocab_size, vocab_sizes=SIZES)


def prepared(*arguments, **options):
    made = corpus(*arguments, **options)
    made.prepare()
    return made


def texts(made):
    return {
        name: [
            made.vocabulary.decode(split.tokens[start:end]).decode()
            for start, end in zip(split.starts, split.ends, strict=True)
        ]
        for name, split in made.open().items()
    }


EXPECTED = {  # in the order of the books' numbers
    split: [books[name].replace("\r\n", "\n") for name in sorted(books, key=int)]
    for split, books in BOOKS.items()
}


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 256), ("sentencepiece", 290)])
def test_a_folder_is_taken_as_it_is_and_its_books_come_back(tmp_path, tokenizer, size):
    made = prepared(folder_of(tmp_path / "books"), tmp_path / "cache", tokenizer, size)
    assert texts(made) == EXPECTED
    assert made.vocab_size == size
    split = made.open()["test"]
    assert split.note == "1 of 100 books, 0 equal to the official files"
    assert made.words(split.tokens) == 4
    assert made.units[split.tokens].sum() == len("A cat ran.\nAway!\n")


def test_a_tokenizer_file_serves_where_the_cache_is_gone(tmp_path):
    books = folder_of(tmp_path / "books")
    first = prepared(books, tmp_path / "one", "sentencepiece", 290)
    kept = first.vocabulary.file.rename(tmp_path / "tokenizer.model")
    second = prepared(books, tmp_path / "two", str(kept), 290)
    for name in SPLITS:
        assert second.open()[name].tokens.tolist() == first.open()[name].tokens.tolist()


def test_words_are_those_of_what_is_scored(tmp_path):
    folder = folder_of(tmp_path / "books")
    (folder / "validation" / "31.txt").write_text("Go on.")
    config = composed(
        "data=pg19", f"data.path={folder}", f"paths.cache={tmp_path / 'cache'}",
        "data.length=3", "data.batch_tokens=3",  # windows begin inside words
    )  # fmt: skip
    data = instantiate(config.data)
    data.trainer = SimpleNamespace(accelerator=CPUAccelerator())
    data.prepare_data()
    train = data.split("train")
    assert data.words(train) == 40 * 4 + 50 * 3
    assert data.words(train.first(len("A dog ran"))) == 3
    assert data.validation_words == 5


def data_set():
    def rows(books):
        address = "http://www.gutenberg.org/ebooks/"
        text = [book.replace("\r\n", "\n") for book in books.values()]
        return datasets.Dataset.from_dict({"url": [address + n for n in books], "text": text})

    return datasets.DatasetDict({split: rows(books) for split, books in BOOKS.items()})


@pytest.fixture(params=["parquet", "saved"])
def on_disk(request, tmp_path):
    folder = tmp_path / "set"
    if request.param == "saved":
        data_set().save_to_disk(folder)
    else:
        for split, rows in data_set().items():
            folder.mkdir(exist_ok=True)
            rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_data_set_on_disk_gives_the_same_books_as_the_folder(on_disk, tmp_path):
    assert texts(prepared(on_disk, tmp_path / "cache")) == EXPECTED


def test_a_data_set_lacking_a_split_or_the_text_is_refused(tmp_path):
    splits = data_set()
    del splits["test"]
    splits.save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="has the splits train, validation, and lacks test"):
        prepared(tmp_path / "two", tmp_path / "cache")
    data_set().rename_column("text", "content").save_to_disk(tmp_path / "renamed")
    with pytest.raises(ValueError, match="columns url, content and no `text`"):
        prepared(tmp_path / "renamed", tmp_path / "cache")


def test_a_loading_script_is_refused_with_the_other_ways(tmp_path):
    (tmp_path / "pg19.py").write_text("")
    with pytest.raises(ValueError, match=r"loading script.*leave out data\.path .*folder of"):
        prepared(tmp_path / "pg19.py", tmp_path / "cache")


def empty(books):
    (books / "test" / "41.txt").unlink()


def misnamed(books):
    (books / "train" / "12.txt").rename(books / "train" / "cats.txt")


def twice(books):
    (books / "test" / "12.txt").write_text("The cat sat.")


def missing(books):
    (books / "validation").rename(books / "valid")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty, r"test has no books; put files <book id>\.txt there"),
        (misnamed, r"cats\.txt is no book, its name is not <book id>\.txt"),
        (twice, "book 12 is in train and in test"),
        (missing, r"there is no folder .*validation; data\.path must have the folders"),
    ],
)
def test_a_folder_that_is_no_pg19_is_refused(tmp_path, spoil, message):
    spoil(folder_of(tmp_path / "books"))
    with pytest.raises((ValueError, OSError), match=message):
        prepared(tmp_path / "books", tmp_path / "cache")


def test_an_unknown_tokenizer_or_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer must be bytes, .* got bpe"):
        corpus(tmp_path, tmp_path, "bpe", 0)
    with pytest.raises(ValueError, match=r"data\.vocab_size=5000"):
        prepared(folder_of(tmp_path / "b"), tmp_path / "c", "sentencepiece", 5000)


def test_the_bundled_books_are_official_files(tmp_path):
    made = prepared(None, tmp_path, kind=Sample)
    splits = made.open()
    assert [len(splits[name].starts) for name in SPLITS] == [2, 1, 1]
    assert [len(splits[name]) for name in SPLITS] == [276_809, 43_638, 14_617]
    assert splits["train"].note == "2 of 28,602 books, 2 equal to the official files"
    assert splits["test"].note == "1 of 100 books, 1 equal to the official files"
    readme = SAMPLE.with_name("README.md").read_text()
    assert hashlib.sha256(SAMPLE.read_bytes()).hexdigest() in readme


def test_the_checksums_are_of_all_held_out_books():
    with open(CHECKSUMS, newline="") as file:
        rows = list(csv.DictReader(file))
    books = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    assert [len(books[name]) for name in SPLITS] == [915, 50, 100]
    assert sum(int(row["bytes"]) for row in books["validation"]) == 17_733_002
    assert sum(int(row["bytes"]) for row in books["test"]) == 41_289_101


class Bucket(BaseHTTPRequestHandler):
    """Lists two files a page, as Google's JSON interface does, and serves them."""

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/list":
            split = query["prefix"].rstrip("/")
            entries = [
                {"name": f"{split}/{n}.txt", "md5Hash": digest(text)}
                for n, text in self.server.books[split].items()
            ]
            first = int(query.get("pageToken", 0))
            answer = {"items": entries[first : first + 1]}
            if first + 1 < len(entries):
                answer["nextPageToken"] = str(first + 1)
            content = json.dumps(answer).encode()
        else:
            _, split, name = url.path.split("/")
            self.server.asked.append(url.path)
            content = self.server.served[split][name.removesuffix(".txt")].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def digest(text):
    return base64.b64encode(hashlib.md5(text.encode()).digest()).decode()


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Bucket) as server:
        server.books, server.asked = BOOKS, []
        server.served = {split: dict(books) for split, books in BOOKS.items()}
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(pg19, "FILES", address)
        monkeypatch.setattr(pg19, "LISTING", f"{address}/list")
        monkeypatch.setattr(pg19, "BOOKS", {split: len(books) for split, books in BOOKS.items()})
        yield server


def test_the_published_files_are_downloaded_once(bucket, tmp_path):
    assert texts(prepared(None, tmp_path)) == EXPECTED
    assert len(bucket.asked) == 4
    made = prepared(None, tmp_path)
    assert len(bucket.asked) == 4
    assert made.open()["test"].note is None


def test_a_damaged_book_is_refused_and_the_others_are_kept(bucket, tmp_path):
    bucket.served["test"]["41"] = "please log in"
    with pytest.raises(ValueError, match=r"test/41\.txt gave a file with MD5"):
        prepared(None, tmp_path)
    assert not (tmp_path / "pg19").exists()
    bucket.served["test"]["41"] = BOOKS["test"]["41"]
    assert texts(prepared(None, tmp_path)) == EXPECTED
    assert sorted(bucket.asked).count("/train/7.txt") == 1


def test_without_network_the_other_ways_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pg19, "LISTING", "http://127.0.0.1:9/list")
    with pytest.raises(FileNotFoundError, match=r"data\.path=FOLDER, or .*hf://datasets/NAME"):
        prepared(None, tmp_path)


def test_a_list_of_other_length_is_refused(bucket, monkeypatch, tmp_path):
    monkeypatch.setitem(pg19.BOOKS, "test", 100)
    with pytest.raises(ValueError, match="lists 1 books of test instead of 100"):
        prepared(None, tmp_path)
