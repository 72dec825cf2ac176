"""CIFAR-10: the archive or its folder, the split, the order of the bytes, what is refused."""

import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate

from data.corpora import cifar10
from data.corpora.cifar10 import MD5, SAMPLE, Cifar10, Cifar10Sample
from data.prepare import download
from tests.support.configs import composed

ROWS, HELD_OUT = 20, 4  # instead of 10,000 and 2,000, to be quick


def python2_pickle(planes: np.ndarray) -> bytes:
    """A batch as the authors wrote it: protocol 2, of Python 2, whose text is bytes."""
    rows, columns = planes.shape
    return (
        b"\x80\x02}(U\x06labels](K\x03K\x07eU\x04datacnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + struct.pack("<BiBi", ord("J"), rows, ord("J"), columns)
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff"
        b"\xffK\x00tb\x89" + struct.pack("<Bi", ord("T"), planes.size) + planes.tobytes() + b"tbu."
    )


@pytest.fixture
def planes():
    """Six batches of images as the files hold them: a plane of each colour after the other."""
    return np.random.default_rng(0).integers(256, size=(6, ROWS, 3072), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, planes, monkeypatch):
    monkeypatch.setattr(cifar10, "ROWS", ROWS)
    monkeypatch.setattr(cifar10, "HELD_OUT", HELD_OUT)
    folder = tmp_path / "raw" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, batch in zip(MD5, planes, strict=True):
        (folder / name).write_bytes(python2_pickle(batch))
    return folder


@pytest.fixture
def archive(folder, monkeypatch):
    """The folder as an archive that passes for the official one."""
    path = folder.parent / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, arcname=folder.name)
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def prepared(path, tmp_path, **settings):
    corpus = Cifar10(path and str(path), str(tmp_path / "cache"), **settings)
    corpus.prepare()
    return corpus


def images(split):
    return split.tokens.reshape(-1, 32, 32, 3)


def test_the_splits_are_all_images_in_the_official_order(folder, planes, tmp_path):
    splits = prepared(folder, tmp_path).open()
    assert {name: len(split.starts) for name, split in splits.items()} == {
        "train": 5 * ROWS - HELD_OUT,
        "validation": HELD_OUT,
        "test": ROWS,
    }
    for split in splits.values():
        assert isinstance(split.tokens, np.memmap)
        assert (split.starts == np.arange(len(split) // 3072) * 3072).all()
    # Back from tokens to the planes of the files.
    found = np.concatenate([images(split) for split in splits.values()])
    assert (found.transpose(0, 3, 1, 2).reshape(planes.shape) == planes).all()


def test_a_token_is_red_green_or_blue_of_the_pixels_in_raster_order(folder, planes, tmp_path):
    tokens = prepared(folder, tmp_path).open()["train"].tokens[:3072]
    red, green, blue = planes[0, 0].reshape(3, 32, 32)
    assert tokens[:6].tolist() == [c[0, n] for n in (0, 1) for c in (red, green, blue)]
    assert tokens[96] == red[1, 0]
    assert tokens[-1] == blue[31, 31]


def test_the_full_sizes_are_those_of_the_papers():
    assert (5 * cifar10.ROWS - cifar10.HELD_OUT, cifar10.HELD_OUT) == (48_000, 2_000)
    assert cifar10.ROWS == 10_000


def test_archive_folder_and_the_folder_above_it_hold_the_same(folder, archive, tmp_path):
    corpora = [prepared(path, tmp_path) for path in (folder, folder.parent, archive)]
    first, second, third = (corpus.open()["train"].tokens for corpus in corpora)
    assert (first == second).all()
    assert (first == third).all()


def test_the_note_counts_the_official_batches_of_a_folder(folder, archive, tmp_path, monkeypatch):
    assert prepared(archive, tmp_path).open()["test"].note is None
    note = prepared(folder, tmp_path).open()["test"].note
    assert note == "0 of 6 batches equal the official ones"
    for name in ("data_batch_2", "test_batch"):
        digest = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(MD5, name, digest)
    assert prepared(folder, tmp_path).open()["train"].note.startswith("2 of 6")


def test_a_folder_that_changes_is_prepared_again(folder, planes, tmp_path):
    before = prepared(folder, tmp_path).open()["test"].tokens.copy()
    (folder / "test_batch").write_bytes(python2_pickle(255 - planes[5]))
    assert (prepared(folder, tmp_path).open()["test"].tokens == 255 - before).all()


def test_the_archive_is_downloaded_once_and_only_what_is_read_is_kept(
    archive, tmp_path, monkeypatch
):
    requests = []
    monkeypatch.setattr(cifar10, "URL", archive.as_uri())

    def fetch(url, target, *, sha256):
        requests.append(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(archive, target)

    monkeypatch.setattr(cifar10, "fetch", fetch)
    for _ in range(2):
        assert len(prepared(None, tmp_path).open()["test"].starts) == ROWS
    assert requests == [archive.as_uri()]
    assert not list((tmp_path / "cache").rglob("*.tar.gz"))


def test_without_network_a_sentence_says_where_to_put_the_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with pytest.raises(FileNotFoundError, match=r"cache/cifar10/cifar-10-python\.tar\.gz, and"):
        prepared(None, tmp_path)


def test_an_archive_that_is_not_the_official_one_is_refused_even_if_that_is_known(
    archive, tmp_path
):
    prepared(archive, tmp_path)
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"not the official archive .* give the folder"):
        prepared(archive, tmp_path)


def table(tmp_path, *lines, header="batch,row,label,class"):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


def test_rows_of_the_test_batch_can_be_left_out(folder, planes, tmp_path):
    rows = table(tmp_path, "test_batch,3,8,ship", "data_batch_1,0,8,ship", "test_batch,19,8,ship")
    whole, less = prepared(folder, tmp_path), prepared(folder, tmp_path, exclude_rows=rows)
    before, after = whole.open(), less.open()
    assert (images(after["test"]) == np.delete(images(before["test"]), [3, 19], axis=0)).all()
    assert after["test"].note.endswith("; 2 of 20 test rows left out")
    assert (after["train"].tokens == before["train"].tokens).all()
    assert "left out" not in after["train"].note


@pytest.mark.parametrize(
    ("lines", "header", "words"),
    [
        (["0"], "row", "must have the columns batch and row"),
        (["test_batch,20"], "batch,row", "line 2: there is no row '20' of 'test_batch'"),
        (["test_batch,-1"], "batch,row", "no row '-1'"),
        (["test_batch"], "batch,row", "no row ''"),
        (["tests,1"], "batch,row", "'tests'"),
        ([f"test_batch,{n}" for n in range(ROWS)], "batch,row", "every row of test_batch"),
    ],
)
def test_a_table_of_other_rows_is_refused(folder, tmp_path, lines, header, words):
    with pytest.raises(ValueError, match=words):
        prepared(folder, tmp_path, exclude_rows=table(tmp_path, *lines, header=header))


def test_missing_files_are_named(folder, tmp_path):
    (folder / "data_batch_3").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match="has no data_batch_3, test_batch; give"):
        prepared(folder, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; correct data\.path"):
        prepared(tmp_path / "nowhere", tmp_path)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def damaged(kind, planes, tmp_path) -> bytes:
    whole = python2_pickle(planes[2])
    if kind == "small":
        return python2_pickle(planes[2, :, : 3 * 28 * 28])
    if kind == "few":
        return python2_pickle(planes[2, :-1])
    if kind == "float":
        return pickle.dumps({"data": planes[2].astype(np.float32)}, protocol=4)
    if kind == "code":
        return pickle.dumps({"data": Bomb(tmp_path / "executed")}, protocol=2)
    return {
        "truncated": whole[:-100],
        "empty": b"",
        "other": pickle.dumps([1, 2]),
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "cannot be read .* get it again"),
        ("empty", "cannot be read"),
        ("text", "cannot be read"),
        ("code", r"would call \w+\.mkdir, which is refused"),
        ("small", r"must hold 20 images of 32 x 32 pixels.* got uint8 \(20, 2352\)"),
        ("few", r"got uint8 \(19, 3072\)"),
        ("float", r"got float32 \(20, 3072\)"),
        ("other", "must hold 20 images"),
    ],
)
def test_a_batch_that_is_damaged_or_other_is_refused_and_leaves_nothing_that_loads(
    kind, words, folder, planes, tmp_path
):
    good = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(damaged(kind, planes, tmp_path))
    with pytest.raises(ValueError, match=f"data_batch_3 of .*{words}"):
        prepared(folder, tmp_path)
    assert not (tmp_path / "executed").exists()
    assert not list((tmp_path / "cache" / "cifar10").glob("images-????????????????"))
    (folder / "data_batch_3").write_bytes(good)
    assert len(prepared(folder, tmp_path).open()["train"].starts) == 5 * ROWS - HELD_OUT


def test_a_preparation_that_is_killed_leaves_nothing_that_loads(folder, planes, tmp_path):
    def die_at_the_third_batch(file, name):
        if name.startswith("data_batch_3"):
            os.kill(os.getpid(), signal.SIGKILL)
        return planes[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "_tokens", die_at_the_third_batch)
        process = multiprocessing.get_context("fork").Process(
            target=prepared, args=(folder, tmp_path)
        )
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in (tmp_path / "cache" / "cifar10").glob("i*")] == [".part"]
    found = images(prepared(folder, tmp_path).open()["test"])
    assert (found.transpose(0, 3, 1, 2).reshape(ROWS, -1) == planes[5]).all()


def test_a_batch_that_python_3_has_saved_again_is_read(folder, planes, tmp_path):
    (folder / "test_batch").write_bytes(pickle.dumps({"data": planes[5]}, protocol=4))
    found = images(prepared(folder, tmp_path).open()["test"])
    assert (found.transpose(0, 3, 1, 2).reshape(ROWS, -1) == planes[5]).all()


def test_the_bundled_sample_is_the_file_that_its_readme_describes(tmp_path):
    sample = Cifar10Sample(None, str(tmp_path))
    sample.prepare()
    splits = sample.open()
    assert [len(split.starts) for split in splits.values()] == [48, 8, 8]
    content = np.concatenate([split.tokens for split in splits.values()]).tobytes()
    readme = Path(SAMPLE).with_name("README.md").read_text()
    assert hashlib.sha256(content).hexdigest() in readme
    assert hashlib.sha256(SAMPLE.read_bytes()).hexdigest() in readme


def test_the_sample_takes_no_other_file(tmp_path):
    with pytest.raises(ValueError, match=r"use data=cifar10 data\.path=mine"):
        Cifar10Sample("mine", str(tmp_path))


def data(*overrides):
    return instantiate(composed("data=cifar10_sample", "run_id=x", *overrides).data)


def test_results_are_bits_per_dim_and_every_byte_is_one(tmp_path):
    corpus = data(f"paths.cache={tmp_path}")
    assert (corpus.measure, corpus.vocab_size, set(corpus.units)) == ("bits_per_dim", 256, {1})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.length=1024", r"data\.length=3072 and data\.documents=split, got 1024 and split"),
        ("data.documents=pack", r"got 3072 and pack"),
        ("data.image_shape=null", r"needs data\.image_shape=\[32, 32, 3\], got None"),
        ("data.image_shape=[16,64,3]", r"got \[16, 64, 3\]"),
    ],
)
def test_windows_that_are_no_images_are_refused(override, words, tmp_path):
    with pytest.raises(Exception, match=words):
        data(f"paths.cache={tmp_path}", override, "data.batch_tokens=3072")


def test_text_has_no_shape(tmp_path):
    with pytest.raises(Exception, match=r"data\.image_shape=null, got \[32, 32, 3\]"):
        instantiate(composed("data=sample", "run_id=x", "data.image_shape=[32,32,3]").data)
