"""Speed of the attention kernels beside their peers, on a GPU:  python -m bench.kernels

Every pattern at 65,536 tokens a call (16 heads, bfloat16), forward and backward, in one run with
the dense kernels of torch, FlexAttention and, where it is installed, FlashAttention-4. Writes
tables and all numbers to ``--out``. ``--break-even``: ours and dense alone, over many lengths, with
a plot.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple
from pathlib import Path

import torch

from bench import report
from bench.patterns import CASES, HEADS, TOKENS, Case, pairs
from bench.peers import (
    Peer,
    dense_peers,
    flash4_is_missing,
    ours,
    sparse_peers,
    surroundings,
)
from bench.planning import planning_times
from bench.timing import inputs, matmul_ceiling, measure, results
from kernels.attend.tuning import DIRECTIONS, ROWS, config_for

LENGTHS = (4096, 16_384, 65_536)
BREAK_EVEN_LENGTHS = tuple(2**n for n in range(10, 17))
PROCESSES = 12  # that compile ours beforehand; each takes some 2 GiB on the card


def main() -> int:
    options = _options()
    if not torch.cuda.is_available():
        raise SystemExit("bench.kernels needs a GPU.")
    device, start = torch.device("cuda"), time.perf_counter()
    cases = [CASES[name] for name in options.patterns]
    print(report.versions_line(), flush=True)
    ceiling = matmul_ceiling(device)
    run = report.Run(ceiling, _configs(cases, device))
    print(f"matmul ceiling {ceiling:.0f} TF/s; {run.configs}", flush=True)
    if flash4_is_missing():
        print(f"without FlashAttention-4: {flash4_is_missing()}", flush=True)
    work = _warm(cases, options.lengths)
    print(f"compiled ours in {time.perf_counter() - start:.0f} s", flush=True)
    deadline = start + 60 * options.minutes
    for case in cases:
        begin = time.perf_counter()
        for row in _rows(case, options, work, device, deadline):
            run.rows.append(row | _rates(row, ceiling))
            report.print_row(run.rows[-1])
        if options.planning and time.perf_counter() < deadline:
            run.planning += [
                _guarded(planning_times, case, case.lengths(options.lengths)[-1], device)
            ]
            print(run.planning[-1], flush=True)
        print(f"{case.name}: {time.perf_counter() - begin:.0f} s\n", flush=True)
        report.write(run, options)  # after each pattern: what was measured survives what follows
    report.print_tables(run)
    print(f"{time.perf_counter() - start:.0f} s in all; written to {report.write(run, options)}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, help=f"default {LENGTHS}")
    parser.add_argument("--quick", action="store_true", help="16,384 only, ours and dense only")
    parser.add_argument("--break-even", action="store_true", help="from 1,024 on, ours and dense")
    parser.add_argument("--peers", nargs="+", help="only these sparse peers (default: all)")
    parser.add_argument("--slow-peers", action="store_true", help="torch's own search for BigBird")
    parser.add_argument("--no-planning", action="store_true", help="do not time the set-up")
    parser.add_argument("--minutes", type=float, default=8.0, help="then what is left is skipped")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    default = LENGTHS
    if options.break_even:
        default = BREAK_EVEN_LENGTHS
    elif options.quick:
        default = (16_384,)
    options.lengths = sorted(options.lengths or default)
    options.sparse_peers = not (options.quick or options.break_even)
    options.planning = options.sparse_peers and not options.no_planning
    if options.break_even:
        options.patterns = [name for name in options.patterns if not CASES[name].is_dense]
    return options


def _configs(cases: list[Case], device: torch.device) -> dict[str, dict]:
    """What ours runs with; tunes a card that is not known yet, before anything is timed."""
    sizes = sorted({case.head_size for case in cases})
    return {
        f"D={size}, {rows} rows": {
            d: list(astuple(config_for(d, size, torch.bfloat16, device, rows))) for d in DIRECTIONS
        }
        for size in sizes
        for rows in ROWS
    }


# ------------------------------------------------------------------------------ ours, compiled


def _warm(cases: list[Case], lengths: list[int]) -> dict[tuple[str, int], tuple[float, float]]:
    """Compile ours in parallel, and count pairs of a head: of ours, and of a plan for all heads."""
    wanted = [(case.name, length) for case in cases for length in case.lengths(lengths)]
    wanted.sort(key=lambda one: -one[1])
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(PROCESSES, len(wanted)), context) as pool:
            return dict(zip(wanted, pool.map(_compile_and_count, wanted), strict=True))
    except BrokenProcessPool as error:
        print(f"compiling beforehand: {_reason(error)}; it goes on one by one", flush=True)
        return {one: _count(*one) for one in wanted}


def _compile_and_count(wanted: tuple[str, int]) -> tuple[float, float]:
    case, length = CASES[wanted[0]], wanted[1]
    device = torch.device("cuda")
    torch.set_num_threads(1)
    try:
        results(ours(case, length, device), *_inputs(case, length, device))
    except Exception as error:  # met again, and reported, where it is timed
        print(f"{wanted}: {_reason(error)}", flush=True)
    torch.cuda.empty_cache()
    return _count(*wanted)


def _count(name: str, length: int) -> tuple[float, float]:
    own = pairs(CASES[name], length)
    shared = CASES[name].has_random_blocks
    return own, pairs(CASES[name], length, shared_plan=True) if shared else own


def _inputs(case: Case, length: int, device) -> list[torch.Tensor]:
    return inputs(length, HEADS, case.head_size, TOKENS, device)


# ------------------------------------------------------------------------------ rows

_dense_rows: dict[tuple, dict] = {}  # dense attention costs the same beside every pattern


def _rows(case: Case, options, work: dict, device, deadline: float) -> Iterator[dict]:
    lengths = case.lengths(options.lengths)
    for length in lengths:
        own, shared = work[case.name, length]
        tensors = _inputs(case, length, device)
        yield _row("ours", ours, case, length, own, tensors)
        for name, peer in dense_peers().items():
            key = (name, length, case.head_size, case.is_causal)
            if key not in _dense_rows:
                dense = pairs(case, length, dense=True)
                _dense_rows[key] = _row(name, peer, case, length, dense, tensors)
            yield _dense_rows[key] | _identity(name, case, length)
        if not options.sparse_peers:
            continue
        for name, peer in sparse_peers(case, options.slow_peers).items():
            if options.peers and name not in options.peers:
                continue
            if time.perf_counter() > deadline:
                yield _identity(name, case, length) | {"error": "left out: the time was up"}
                continue
            with surroundings(name):
                row = _row(name, peer, case, length, shared, tensors)
                if length == lengths[0] and "forward" in row:
                    row |= _guarded(_compare, peer, case, length, tensors)
            yield row
            torch.cuda.empty_cache()


def _row(name: str, peer: Peer, case: Case, length: int, work: float, tensors) -> dict:
    """Times of an implementation, or the reason why there are none.

    Args:
        work: live pairs of a head.
    """
    row = _identity(name, case, length) | {"pairs_per_query": work / length}
    start = time.perf_counter()
    row |= _guarded(lambda: asdict(measure(peer(case, length, tensors[0].device), *tensors)))
    return row | {"seconds": time.perf_counter() - start}


def _identity(name: str, case: Case, length: int) -> dict:
    return {
        "pattern": case.name, "text": repr(case.pattern), "implementation": name, "length": length,
        "head_size": case.head_size,
    }  # fmt: skip


def _rates(row: dict, ceiling: float) -> dict:
    """TF/s on live pairs, and their share of what the card reaches in a product of matrices."""
    if "forward" not in row:
        return {}
    tokens = TOKENS // row["length"] * row["length"]  # whole sequences
    flops = 4 * row["head_size"] * row["pairs_per_query"] * HEADS * tokens  # of forward
    forward, backward = flops / row["forward"] / 1e9, 2.5 * flops / row["backward"] / 1e9
    return {
        "forward_tflops": forward,
        "backward_tflops": backward,
        "forward_share": forward / ceiling,
        "backward_share": backward / ceiling,
    }


def _compare(peer: Peer, case: Case, length: int, tensors) -> dict:
    """Largest relative difference (Frobenius) of out, dq, dk, dv between ours and the peer.

    With random blocks, of head 0 alone: the peer gives its plan to all heads.
    """
    device = tensors[0].device
    heads = slice(0, 1) if case.has_random_blocks else slice(None)
    mine = results(ours(case, length, device), *tensors)
    theirs = results(peer(case, length, device), *tensors)
    worst = 0.0
    for x, y in zip(mine, theirs, strict=True):
        x, y = x[:, heads].float(), y[:, heads].float()
        worst = max(worst, float((x - y).norm() / y.norm()))
    return {"difference": worst}


def _guarded(function: Callable[..., dict], *arguments) -> dict:
    """What a function returns, or the reason why it failed: a peer's failure stops nothing."""
    try:
        return function(*arguments)
    except Exception as error:
        torch.cuda.empty_cache()
        return {"error": _reason(error)}


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    sys.exit(main())
