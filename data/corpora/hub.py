"""Books of a Hugging Face data set, on the hub or on disk, as a folder of text files."""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import datasets
from datasets.packaged_modules.text.text import Text
from tqdm import tqdm

from data.corpora import SPLITS
from data.prepare.files import create

PREFIX = "hf://datasets/"

log = logging.getLogger(__name__)


def is_data_set(path: str) -> bool:
    """Whether a ``data.path`` is one that `exported` reads, rather than a folder of texts."""
    if path.startswith(PREFIX):
        return True
    folder = Path(path).expanduser()
    if folder.suffix == ".py":
        return True
    return folder.is_dir() and (_is_saved(folder) or any(folder.rglob("*.parquet")))


def exported(path: str, cache: Path) -> Path:
    """A folder ``{train,validation,test}/<number>.txt`` of the books of a data set, made once.

    A data set of the hub is read as a stream, once, and is not looked for again when it is there.
    The number is that of the Gutenberg address in the column ``url``, or else that of the row.
    Lines end as in the published files, in ``\\r\\n``.

    Args:
        path: ``hf://datasets/NAME`` or ``hf://datasets/NAME@REVISION``, a folder with parquet
            files, or a folder of ``DatasetDict.save_to_disk``.

    Raises:
        ValueError: if it is a loading script, or has no such splits or no column ``text``.
        OSError: if it cannot be reached or read, or the disk is full.
    """
    if path.startswith(PREFIX):
        target = cache / "texts" / path.removeprefix(PREFIX).replace("/", "--")
        return create(target, lambda part: _export(path, _streams(path), part))
    folder = Path(path).expanduser()
    splits = datasets.load_from_disk(folder) if _is_saved(folder) else _streams(str(folder))
    _require_splits(path, splits)
    target = cache / "texts" / f"{folder.name}-{_fingerprint(folder)}"
    return create(target, partial(_export, path, splits))


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file()


def _streams(path: str) -> Mapping[str, Iterable[dict]]:
    name, _, revision = path.removeprefix(PREFIX).partition("@")
    load = partial(datasets.load_dataset_builder, name, revision=revision or None)
    try:
        builder = load()
        if isinstance(builder, Text):  # a file is a book, not each of its lines
            builder = load(sample_by="document")
        return builder.as_streaming_dataset()
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"{path} is a loading script, which `datasets` 4 and later refuse: leave out data.path "
            f"to download the published files, or give a folder of {{train,validation,test}}/*.txt."
        ) from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{path} cannot be read ({reason}); leave out data.path to download the published "
            f"files, or give a folder of {{train,validation,test}}/*.txt."
        ) from error


def _export(path: str, splits: Mapping[str, Iterable[dict]], part: Path) -> None:
    _require_splits(path, splits)
    log.info("writing the books of %s to %s", path, part.parent)
    for split in SPLITS:
        create(part / split, partial(_write, path, splits[split]))


def _write(path: str, rows: Iterable[dict], part: Path) -> None:
    part.mkdir(exist_ok=True)
    for number, row in enumerate(tqdm(rows, desc=part.stem, unit=" books", disable=None)):
        if not isinstance(row.get("text"), str):
            raise ValueError(
                f"{path} has the columns {', '.join(row)} and no `text`; rename one, or give a "
                f"folder of {{train,validation,test}}/*.txt."
            )
        address = re.search(r"gutenberg\.org/ebooks/(\d+)", str(row.get("url")))
        text = row["text"].replace("\r\n", "\n").replace("\n", "\r\n")
        book = part / f"{address[1] if address else number}.txt"
        book.write_bytes(text.encode())


def _require_splits(path: str, splits: Mapping[str, Iterable[dict]]) -> None:
    if missing := [name for name in SPLITS if name not in splits]:
        raise ValueError(
            f"{path} has the splits {', '.join(splits)}, and lacks {', '.join(missing)}; give it "
            f"all three, or use data=text data.path=FOLDER."
        )


def _fingerprint(folder: Path) -> str:
    """Stands for the files of a folder, by names, sizes and times: 16 hexadecimal digits."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
