"""Check every configuration of the attention kernels on the GPU at hand:  python -m bench.verify

A configuration is right if output and gradients are as exact as the reference is in the same dtype
(`kernels.attend.trial`), and bit-equal from run to run. Each is compiled and checked in one of many
processes, because compilation takes most of the time. Exit status 1 if one that ships is wrong;
the tuner passes over any other, which it would check itself.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from unittest import mock

import torch

from bench import large
from bench.shipped import shipped_for
from kernels.attend import descriptors, trial, tuning
from kernels.attend.tuning import DIRECTIONS, DTYPES, HEAD_SIZES, Config, candidates

PROCESSES = 16  # each has a context of about half a GiB on the card
WORST = 3  # names of wrong numbers in a line
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Check:
    """One configuration of one direction, the others being safe, on one way to load tiles."""

    direction: str
    head_size: int
    dtype: str
    config: Config
    copies: bool
    repeats: int

    def __str__(self) -> str:
        c = self.config
        path = "copies" if self.copies else "pointers"
        tile = f"{c.queries}x{c.keys} {c.warps} warps {c.stages} stages"
        return f"{self.direction:8} D={self.head_size:<3} {self.dtype:8} {path:8} {tile}"


def run_check(check: Check) -> tuple[str, str]:
    """A verdict ("right", "no room", "wrong", "failed", "not run") and what there is to say.

    After an error of the card itself nothing more can run in this process: "not run".
    """
    if _broken:
        return "not run", ""
    dtype, device = NAMES[check.dtype], torch.device("cuda")
    safe = {d: candidates(d, check.head_size, dtype)[0] for d in DIRECTIONS}
    try:
        with (
            mock.patch.object(descriptors, "has_copy_engine", return_value=check.copies),
            tuning.forced(**safe | {check.direction: check.config}),
        ):
            errors = trial.compare(check.head_size, dtype, device)
            if errors is None:
                return "no room", ""
            wrong = [
                f"{name} is off by {error:.1e}, allowed {allowed:.1e}"
                for name, (error, allowed) in errors.items()
                if not error <= allowed
            ]
            changed = _changing(check, dtype, device)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if "CUDA error" in str(error) or "AcceleratorError" in type(error).__name__:
            _broken.append(check)
        return "failed", text
    wrong += [f"{name} changes from run to run" for name in changed]
    return ("wrong", "; ".join(wrong[:WORST])) if wrong else ("right", "")


_broken: list[Check] = []  # what took this process's context down


def _changing(check: Check, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Names of results that are not bit-equal over the repeats."""
    length = 300 if dtype == torch.float32 else trial.LENGTH
    inputs = trial._inputs(2, length, check.head_size, dtype, device)
    first = trial._run(inputs, "fused")
    changed = set()
    for _ in range(check.repeats - 1):
        again = trial._run(inputs, "fused")
        changed |= {name for name, x in again.items() if not torch.equal(x, first[name])}
    return sorted(changed)


# ------------------------------------------------------------------------------ what is checked


def checks(options, card: str, paths: tuple[bool, ...]) -> list[Check]:
    chosen = shipped_for(card) if options.shipped else _search_space()
    found = []
    for direction, size, dtype, config in chosen:
        asked = (options.direction, options.head_size, options.dtype)
        if all(not a or h in a for a, h in zip(asked, (direction, size, dtype), strict=True)):
            found += [Check(direction, size, dtype, config, p, options.repeats) for p in paths]
    return found


def _search_space() -> Iterator[tuple]:
    for direction, size, dtype in itertools.product(DIRECTIONS, HEAD_SIZES, NAMES):
        for config in candidates(direction, size, NAMES[dtype]):
            yield direction, size, dtype, config


def run_all(wanted: list[Check], processes: int) -> Iterator[tuple[Check, str, str]]:
    """Results as they come; what a broken process left over is given to fresh ones."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    while wanted:
        left = []
        with ProcessPoolExecutor(min(processes, len(wanted)), context) as pool:
            futures = [(check, pool.submit(run_check, check)) for check in wanted]
            for check, future in futures:
                try:
                    verdict, note = future.result()
                except BrokenProcessPool:  # the process died; which check it ran is not known
                    verdict, note = "died", "its process, or one beside it, died"
                if verdict == "not run":
                    left.append(check)
                else:
                    yield check, verdict, note
        wanted = left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shipped", action="store_true", help="only what configs.json ships")
    parser.add_argument("--direction", choices=DIRECTIONS, action="append")
    parser.add_argument("--head-size", type=int, choices=HEAD_SIZES, action="append")
    parser.add_argument("--dtype", choices=NAMES, action="append")
    parser.add_argument("--repeats", type=int, help="runs that must be bit-equal (default 20)")
    parser.add_argument("--thorough", action="store_true", help="1000 repeats of what ships")
    parser.add_argument("--large", action="store_true", help="also tensors of over 2**31 elements")
    parser.add_argument("--processes", type=int, default=min(PROCESSES, os.cpu_count() or 1))
    options = parser.parse_args()
    options.shipped = options.shipped or options.thorough
    options.repeats = options.repeats or (1000 if options.thorough else 20)
    if not torch.cuda.is_available():
        parser.error("there is no GPU to check on; `python -m bench.aot` needs none.")
    card = torch.cuda.get_device_name()
    paths = (True, False) if torch.cuda.get_device_capability() >= (9, 0) else (False,)
    wanted = checks(options, card, paths)
    if options.shipped and not wanted:
        print(f"no configuration ships for {card}")
    ships = set(shipped_for(card))
    start = time.perf_counter()
    table: dict[tuple, Counter] = {}
    bad = 0
    print(f"{card}: {len(wanted)} checks in {options.processes} processes", flush=True)
    for check, verdict, note in run_all(wanted, options.processes):
        row = (check.direction, check.head_size, check.dtype)
        table.setdefault(row, Counter())[verdict] += 1
        if verdict not in ("right", "no room"):
            mark = ""
            if (*row, check.config) in ships:
                mark, bad = "SHIPPED ", bad + 1
            print(f"{mark}{verdict}: {check}: {note}", flush=True)
    _print_table(table)
    print(f"{time.perf_counter() - start:.0f} s; {bad} of what ships is wrong")
    if options.large:
        bad += large.check(torch.device("cuda"))
    return int(bad > 0)


def _print_table(table: dict[tuple, Counter]) -> None:
    verdicts = ("right", "no room", "wrong", "failed", "died")
    print(f"{'direction':10}{'D':>4}  {'dtype':9}{'checked':>8}", *(f"{v:>8}" for v in verdicts))
    for (direction, size, dtype), counts in table.items():
        numbers = (f"{counts[v]:8}" for v in verdicts)
        print(f"{direction:10}{size:4}  {dtype:9}{counts.total():8}", *numbers)


if __name__ == "__main__":
    sys.exit(main())
