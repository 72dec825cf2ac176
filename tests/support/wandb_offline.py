"""Reads what wandb wrote offline: the configuration, the history and the id of a run.

A `.wandb` file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB, in which each chunk
has a checksum (4 bytes), a length (2) and a kind (1), and a record is one chunk or several.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, CHUNK_HEADER = 32 * 1024, 7, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def runs(output: Path) -> list[Path]:
    """The offline runs below a folder, oldest first."""
    return sorted(output.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)


def run_id(path: Path) -> str:
    return next(r.run.run_id for r in _records(path) if r.HasField("run"))


def config(path: Path) -> dict[str, Any]:
    run = next(r.run for r in _records(path) if r.HasField("run"))
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows, in their order."""
    rows = []
    for record in _records(path):
        if record.HasField("history"):
            rows.append({})
            for item in record.history.item:
                *outer, key = item.nested_key or [item.key]
                node = rows[-1]
                for name in outer:
                    node = node.setdefault(name, {})
                node[key] = json.loads(item.value_json)
    return rows


def media(path: Path, value: dict[str, Any]) -> Path:
    """The file of a logged table or image; ``value`` is what the history holds for it."""
    name = value["path"] if "path" in value else value["filenames"][0]
    return path.parent / "files" / name


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record  # a test is about not importing wandb

    data, position, pending = path.read_bytes(), FILE_HEADER, b""
    assert data.startswith(b":W&B")
    while position + CHUNK_HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < CHUNK_HEADER:  # a header does not cross blocks
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += CHUNK_HEADER
        chunk = data[position : position + length]
        position += length
        pending = chunk if kind in (WHOLE, FIRST) else pending + chunk
        if kind in (WHOLE, LAST):
            yield Record.FromString(pending)
