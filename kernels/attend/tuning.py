"""Which tiles, warps and pipeline stages a kernel runs with, by card, head size, dtype, direction.

`configs.json` holds what was tuned on the cards named there; `SAME_CHIP` names cards with the chip
of one of them. On any other card the first call tunes: it times a few candidates, having checked
the result and the gradients of each against the reference on that very card (compilers do
miscompile), and keeps the choice in ``$STRIDER_CACHE`` (default ``~/.cache/strider``).
`python -m bench.verify` checks every candidate.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
import triton

from kernels.common.interpreter import INTERPRETED

log = logging.getLogger(__name__)

DIRECTIONS = ("forward", "dq", "dkv")
ROWS = ("short", "long")  # few tiles a row, as in a window, or many, as in dense attention
LONG = 2048  # tokens that a row of a long list visits on average
HEAD_SIZES = (16, 32, 64, 128, 256)  # a head is padded to the next of these
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SAME_CHIP = {"NVIDIA H100 80GB HBM3": "NVIDIA H200"}  # their memories differ


@dataclass(frozen=True)
class Config:
    """Tokens of a tile of queries and of keys, warps of a program, stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def tile(self) -> tuple[int, int]:
        return self.queries, self.keys

    def fit(self, queries: int, keys: int) -> "Config":
        """No tile longer than the sequence, rounded up to a power of two, and at least 16."""
        most = [max(16, triton.next_power_of_2(n)) for n in (queries, keys)]
        return replace(self, queries=min(self.queries, most[0]), keys=min(self.keys, most[1]))


def candidates(direction: str, head_size: int, dtype: torch.dtype) -> list[Config]:
    """The search space of one kernel; the first one is the safe choice."""
    if dtype == torch.float32:  # no tensor cores: small tiles, or registers spill
        tiles = [(32, 32, 4), (16, 64, 4), (64, 32, 4), (32, 64, 8)]
        return [Config(*tile, stages) for stages in (1, 2) for tile in tiles]
    if head_size == 256:
        tiles = [(64, 32, 4), (32, 64, 4), (64, 64, 8), (128, 32, 8)]
    elif direction == "dkv":
        tiles = [(32, 64, 4), (64, 64, 4), (128, 64, 4), (64, 128, 8), (32, 128, 8)]
    else:
        tiles = [(64, 64, 4), (64, 128, 4), (64, 32, 4), (128, 64, 8), (128, 128, 8)]
    return [Config(*tile, stages) for stages in (2, 3, 4) for tile in tiles]


def config_for(
    direction: str, head_size: int, dtype: torch.dtype, device: torch.device, rows: str = "short"
) -> Config:  # fmt: skip
    """The configuration of a kernel.

    Args:
        direction: "forward", "dq", or "dkv" (gradients of keys and values).
        head_size: the larger of D and Dv.
        rows: "short" or "long", what a program has to visit.
    """
    padded = max(16, triton.next_power_of_2(head_size))
    if direction in _forced:
        return _forced[direction]
    if INTERPRETED:
        return Config(32, 64 if direction == "dkv" else 32, 4, 1)
    table = tuned(torch.cuda.get_device_name(device))
    name = str(dtype).removeprefix("torch.")
    if name not in table or str(padded) not in table[name]:
        # In a thread of its own: this may be inside an operator, where autograd does not record.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(tune, padded, dtype, device).result()
        _remember(torch.cuda.get_device_name(device), name, str(padded), found)
    return Config(*table[name][str(padded)][rows][direction])


_forced: dict[str, Config] = {}


@contextlib.contextmanager
def forced(**configs: Config) -> Iterator[None]:
    """Run the directions named with these configurations, inside a ``with`` block."""
    before = dict(_forced)
    _forced.update(configs)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def forced_now() -> tuple:
    """What is forced, hashable: empty outside of ``forced``."""
    return tuple(_forced.items())


# ------------------------------------------------------------------------------ what is known


@functools.cache
def shipped() -> dict:
    """card -> dtype -> padded head size -> rows -> direction -> [queries, keys, warps, stages]."""
    known = json.loads((Path(__file__).parent / "configs.json").read_text())
    return {card: known[same] for card, same in SAME_CHIP.items()} | known


@functools.cache
def tuned(card: str) -> dict:
    """What is known for a card: what ships, and what was tuned on this machine."""
    known = {dtype: dict(sizes) for dtype, sizes in shipped().get(card, {}).items()}
    file = _cache_file(card)
    if file.exists():
        for dtype, sizes in json.loads(file.read_text()).items():
            for size, configs in sizes.items():
                if any(set(of_rows) != set(DIRECTIONS) for of_rows in configs.values()):
                    continue  # tuned by an older version, whose kernels had other names
                known.setdefault(dtype, {}).setdefault(size, configs)
    return known


def _remember(card: str, dtype: str, size: str, found: dict[str, dict[str, Config]]) -> None:
    plain = {
        rows: {direction: astuple(config) for direction, config in configs.items()}
        for rows, configs in found.items()
    }
    tuned(card).setdefault(dtype, {})[size] = plain
    file = _cache_file(card)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: processes that tune at the same time leave a whole file.
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(tuned(card), indent=1))
    fresh.replace(file)


def _cache_file(card: str) -> Path:
    folder = Path(os.environ.get("STRIDER_CACHE", "~/.cache/strider")).expanduser()
    return folder / f"attend {card} triton {triton.__version__}.json".replace(" ", "-")


# ------------------------------------------------------------------------------ tuning


def tune(head_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Config]]:
    """The fastest configurations whose numbers are right: rows -> direction -> configuration.

    Raises:
        RuntimeError: if no candidate of a direction computes the right numbers on this card.
    """
    from kernels.attend import trial  # which calls attend, which asks for configurations

    torch.cuda.set_device(device)
    card = torch.cuda.get_device_name(device)
    log.warning(f"tuning attention once for {card}, {dtype}, heads of {head_size}")
    found: dict[str, dict[str, Config]] = {rows: {} for rows in ROWS}
    for direction in DIRECTIONS:
        safe = {d: candidates(d, head_size, dtype)[0] for d in DIRECTIONS}
        times: dict[str, dict[Config, float]] = {rows: {} for rows in ROWS}
        for config in likely(direction, head_size, dtype):
            with forced(**safe | found["short"] | {direction: config}):
                if trial.is_right(head_size, dtype, device):
                    for rows in ROWS:
                        times[rows][config] = trial.milliseconds(
                            direction, rows, head_size, dtype, device
                        )
        if not times["short"]:
            raise RuntimeError(
                f"no configuration of the {direction!r} kernel computes right numbers on {card} "
                f"with Triton {triton.__version__}; use implementation='reference', and report the "
                f"output of `python -m bench.verify`."
            )
        for rows in ROWS:
            found[rows][direction] = min(times[rows], key=times[rows].get)
    return found


def likely(direction: str, head_size: int, dtype: torch.dtype) -> list[Config]:
    """The safe choice, and what is best on the cards that ship.

    Each costs seconds to compile and check; the whole search space would take a first call minutes.
    """
    name = str(dtype).removeprefix("torch.")
    best = [
        Config(*sizes[name][str(head_size)][rows][direction])
        for sizes in shipped().values()
        for rows in ROWS
    ]
    return list(dict.fromkeys([candidates(direction, head_size, dtype)[0], *best]))
