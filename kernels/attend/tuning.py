"""Which tiles, warps and pipeline stages a kernel runs with, by card, head size, dtype, direction.

`configs.json` holds what was tuned on the cards named there. On any other card the first call tunes:
it times a few candidates, having checked the result and the gradients of each against the reference on
that very card (compilers do miscompile), and keeps the choice in ``$STRIDER_CACHE`` (default
``~/.cache/strider``). `python -m bench.verify` checks every candidate.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
import triton

from kernels.interpreter import INTERPRETED

log = logging.getLogger(__name__)

DIRECTIONS = ("forward", "queries", "keys")
HEAD_SIZES = (16, 32, 64, 128, 256)  # a head is padded to the next of these
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        return [Config(*tile, stages) for tile in tiles for stages in (1, 2)]
    if head_size == 256:
        tiles = [(64, 32, 4), (32, 64, 4), (64, 64, 8), (128, 32, 8)]
    elif direction == "keys":
        tiles = [(32, 64, 4), (64, 64, 4), (64, 128, 8), (32, 128, 8), (128, 64, 4)]
    else:
        tiles = [(64, 64, 4), (64, 32, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8)]
    return [Config(*tile, stages) for tile in tiles for stages in (2, 3, 4)]


def config_for(
    direction: str, head_size: int, dtype: torch.dtype, device: torch.device,
    tile: tuple[int, int] | None = None,
) -> Config:  # fmt: skip
    """The configuration of a kernel.

    Args:
        direction: "forward", "queries" (dQ) or "keys" (dK and dV).
        head_size: the larger of D and Dv.
        tile: the tile that the caller's list has, if there is one.
    """
    padded = max(16, triton.next_power_of_2(head_size))
    if tile is not None:
        return Config(*tile, 8 if tile[0] * tile[1] >= 128 * 128 else 4, 2)
    if direction in _forced:
        return _forced[direction]
    if INTERPRETED:
        return Config(32, 64 if direction == "keys" else 32, 4, 1)
    table = tuned(torch.cuda.get_device_name(device))
    name = str(dtype).removeprefix("torch.")
    if name not in table or str(padded) not in table[name]:
        found = tune(padded, dtype, device)
        _remember(torch.cuda.get_device_name(device), name, str(padded), found)
        return found[direction]
    return Config(*table[name][str(padded)][direction])


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


# ------------------------------------------------------------------------------ what is known


@functools.cache
def shipped() -> dict:
    """card -> dtype -> padded head size -> direction -> [queries, keys, warps, stages]."""
    return json.loads((Path(__file__).parent / "configs.json").read_text())


@functools.cache
def tuned(card: str) -> dict:
    """What is known for a card: what ships, and what was tuned on this machine."""
    known = {dtype: dict(sizes) for dtype, sizes in shipped().get(card, {}).items()}
    file = _cache_file(card)
    if file.exists():
        for dtype, sizes in json.loads(file.read_text()).items():
            for size, configs in sizes.items():
                known.setdefault(dtype, {}).setdefault(size, configs)
    return known


def _remember(card: str, dtype: str, size: str, found: dict[str, Config]) -> None:
    plain = {direction: astuple(config) for direction, config in found.items()}
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


def tune(head_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Config]:
    """Time candidates of each direction whose numbers are right; a few seconds a direction.

    Raises:
        RuntimeError: if no candidate of a direction computes the right numbers on this card.
    """
    from kernels.attend import trial  # which calls attend, which asks for configurations

    log.info(f"tuning attention for {torch.cuda.get_device_name(device)}, {dtype}, D={head_size}")
    found: dict[str, Config] = {}
    for direction in DIRECTIONS:
        safe = {d: candidates(d, head_size, dtype)[0] for d in DIRECTIONS} | found
        times = {}
        for config in candidates(direction, head_size, dtype):
            if config.stages > 3:
                continue
            with forced(**safe | {direction: config}):
                if trial.is_right(direction, head_size, dtype, device):
                    times[config] = trial.milliseconds(direction, head_size, dtype, device)
        if not times:
            raise RuntimeError(
                f"no configuration of the {direction} kernel computes the right numbers on "
                f"{torch.cuda.get_device_name(device)} with Triton {triton.__version__}; use "
                f"implementation='reference', and report the output of `python -m bench.verify`."
            )
        found[direction] = min(times, key=times.get)
    return found
