"""Compile the attention kernels for sm_80 and sm_90 without a GPU:  python -m bench.aot

Default: the search space of `kernels.attend.tuning`, in parallel. ``--shipped``: what configs.json
ships and the safe choice of common sizes, which the tests compile. ``--pattern``: the safe kernels
of a pattern in bfloat16. Exit status 1 if a kernel does not compile, or a shipped one has no room.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is first imported

import argparse
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from unittest import mock

import torch
import triton

from bench.compiling import SHARED_LIMIT, Compiled, compiled_for
from bench.shipped import shipped_for
from kernels.attend import launch, setup, tuning
from kernels.attend.call import Call
from kernels.attend.passes import Pass
from kernels.attend.tuning import DIRECTIONS, DTYPES, HEAD_SIZES, Config, candidates
from kernels.patterns import parse

# One rule that holds every term.
EVERY_TERM = (
    "causal() & others() & (window(8) | window(2, block=4) | dilated(3, 2) | strided(5)"
    " | fixed(8, 2) | global_tokens(2) | prefix(3) | sinks(2) | leading_queries(2)"
    " | blocks('x./xx', block=8) | near2d(8, 8, 2, channels=2) | block_diffusion(8, 64)"
    " | global_at(3, 40) | random_blocks(2, block=4)"
    " | per_head(window(3), strided(7), summary(4, 2)))"
)
COMMON = "causal() & (window(512) | global_tokens(16))"
STRIDED = "causal() & (window(8) | strided(8))"  # tokens by residue, merged with a window
UNEVEN = "causal() & (window(8) | strided(5))"  # the same, where the residues differ in length
FIXED = "causal() & fixed(8, 2)"  # summary cells, gathered
BLOCKS = "causal() & (window(3, block=64) | global_tokens(128))"  # positions in a document count
CUT_ROWS = "window(8, 8) | global_tokens(2)"  # rows of 64 tiles, cut and merged again
LISTED = "causal() & (window(8) | global_at(3, 3900))"  # the same of listed tokens
KERNELS = {"forward": "forward_kernel", "dq": "dq_kernel", "dkv": "dkv_kernel"}
BEST_PATHS = ((80, False), (90, True))  # capability, and whether by the copy engine
PATHS = (*BEST_PATHS, (90, False))
LENGTH = 1024  # tokens: the longest tile, in the classes of a stride as well


@dataclass(frozen=True)
class Variant:
    """One call of a direction, and how it is compiled.

    Args:
        copies: tiles come through the copy engine (sm_90 only), else through pointers.
        one_pass: the whole pattern in the order of the text, whatever would be faster.
        turned: q, k and v lie in memory as (B, H, D, L).
        documents: the batch holds several documents.
    """

    capability: int
    direction: str
    dtype: torch.dtype
    head_size: int
    config: Config
    pattern: str = EVERY_TERM
    copies: bool = False
    one_pass: bool = False
    turned: bool = False
    documents: bool = False
    length: int = LENGTH

    def __str__(self) -> str:
        c = self.config
        dtype = str(self.dtype).removeprefix("torch.")
        path = "copies" if self.copies else "turned" if self.turned else "pointers"
        tile = f"{c.queries}x{c.keys} {c.warps}w {c.stages}s"
        return f"sm_{self.capability} {path:8} {dtype:8} D={self.head_size:<3} {tile:14}"


def search_space() -> Iterator[Variant]:
    """Every candidate of the tuner, on the paths that each card has."""
    for direction, size, dtype in itertools.product(DIRECTIONS, HEAD_SIZES, DTYPES):
        for config in candidates(direction, size, dtype):
            yield from _on_each_path(direction, dtype, size, config)


def shipped() -> Iterator[Variant]:
    """Safe choices, what configs.json holds, on its card, and every kind of pass and argument."""
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    chosen = {
        (direction, dtype, size, candidates(direction, size, dtype)[0], path)
        for direction in DIRECTIONS
        for dtype in (torch.bfloat16, torch.float32)
        for size in (64, 128)
        for path in BEST_PATHS
    }
    for card in tuning.shipped():
        path = BEST_PATHS[0] if "A100" in card else BEST_PATHS[1]
        for direction, size, dtype, config in shipped_for(card):
            chosen.add((direction, dtypes[dtype], size, config, path))
    for direction, dtype, size, config, path in sorted(chosen, key=str):
        # The rule with every term compiles slowly: one configuration of a direction is enough.
        is_first = config == candidates(direction, 64, torch.bfloat16)[0]
        pattern = EVERY_TERM if (dtype, size, is_first) == (torch.bfloat16, 64, True) else COMMON
        yield from _on_each_path(direction, dtype, size, config, (path,), pattern)
    for capability, direction in itertools.product(SHARED_LIMIT, DIRECTIONS):
        safe = candidates(direction, 64, torch.bfloat16)[0]
        bare = (capability, direction, torch.bfloat16, 64, safe)
        copies = capability >= 90
        yield Variant(*bare, STRIDED, copies)
        yield Variant(*bare, UNEVEN, copies=False)
        yield Variant(*bare, FIXED, copies)
        yield Variant(*bare, CUT_ROWS, copies, length=4096)
        yield Variant(*bare, LISTED, copies, length=4096)
        for text in ("causal()", BLOCKS, FIXED):  # tiles of the row, of documents, gathered
            yield Variant(*bare, text, copies, documents=True)
        yield Variant(*bare, "causal()", turned=True)


def of_pattern(pattern: str, documents: bool) -> Iterator[Variant]:
    """The safe kernels of one pattern, in bfloat16, for one document a row or for several."""
    for capability, direction, size in itertools.product(SHARED_LIMIT, DIRECTIONS, (64, 128)):
        safe = candidates(direction, size, torch.bfloat16)[0]
        copies = capability >= 90
        bare = capability, direction, torch.bfloat16, size, safe, pattern, copies
        yield Variant(*bare, documents=documents)


def _on_each_path(
    direction, dtype, size, config, paths=PATHS, pattern=EVERY_TERM
) -> Iterator[Variant]:
    for capability, copies in paths:
        yield Variant(
            capability, direction, dtype, size, config, pattern, copies, one_pass=True
        )  # fmt: skip


# ------------------------------------------------------------------------------ compiling


def compile_variant(variant: Variant) -> list[Compiled] | str:
    """The kernels of a variant's direction, or the error that the compiler gave."""
    torch.set_num_threads(1)
    safe = {d: candidates(d, variant.head_size, variant.dtype)[0] for d in DIRECTIONS}
    configs = safe | {variant.direction: variant.config}
    passes = _one_pass if variant.one_pass else setup.chains
    try:
        with (
            compiled_for(variant.capability, variant.copies) as kernels,
            mock.patch.object(setup, "chains", passes),
            tuning.forced(**configs),
        ):
            _call(variant)
    except Exception as error:  # whatever the compiler raises is this variant's result
        return f"{type(error).__name__}: {error}"
    other = set(KERNELS.values()) - {KERNELS[variant.direction]}
    return [kernel for kernel in kernels if kernel.kernel not in other]


def _one_pass(pattern, heads: int, packed: bool):
    return [(Pass(pattern.bound(), tuple(range(heads))),)]


def _call(variant: Variant) -> None:
    shape = (1, variant.length, 2, variant.head_size)
    q, k, v, out, dout = (torch.zeros(shape, dtype=variant.dtype).transpose(1, 2) for _ in range(5))
    if variant.turned:
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    documents = torch.zeros(1, variant.length, dtype=torch.int32) if variant.documents else None
    scale = variant.head_size**-0.5
    call = Call(parse(variant.pattern), scale, variant.dtype, documents).flatten()
    if variant.direction == "forward":
        launch.forward(q, k, v, *call)
    else:
        lse = torch.zeros(q.shape[:3])
        launch.backward(dout, None, q, k, v, out, lse, *call)


# ------------------------------------------------------------------------------ report


def report(variant: Variant, result: list[Compiled] | str, must_fit: bool) -> Counter:
    """Print one line a kernel; count the verdicts."""
    if isinstance(result, str):
        print(f"FAILED  {variant} {variant.direction}: {result}", flush=True)
        return Counter(FAILED=1)
    verdicts = Counter()
    for k in result:
        fits = k.shared <= SHARED_LIMIT[variant.capability]
        verdict = "ok" if fits else "FAILED" if must_fit else "no room"
        verdicts[verdict] += 1
        verdicts["spilling"] += k.stores > 0
        print(
            f"{verdict:7} {variant} {k.kernel:19} {k.registers:3} registers {k.stack:5} B stack "
            f"{k.stores:4} STL {k.loads:4} LDL {k.shared:7,} B shared {k.digest} "
            f"{k.seconds:5.1f} s",
            flush=True,
        )
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shipped", action="store_true", help="only what ships, and safe choices")
    parser.add_argument("--pattern", action="append", help="the safe kernels of a pattern")
    parser.add_argument("--documents", action="store_true",
                        help="with --pattern: rows hold several")  # fmt: skip
    parser.add_argument("--target", type=int, choices=SHARED_LIMIT, action="append")
    parser.add_argument("--direction", choices=DIRECTIONS, action="append")
    parser.add_argument("--head-size", type=int, choices=HEAD_SIZES, action="append")
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in DTYPES],
                        action="append")  # fmt: skip
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()

    def is_wanted(v: Variant) -> bool:
        asked = (options.target, options.direction, options.head_size, options.dtype)
        has = (v.capability, v.direction, v.head_size, str(v.dtype).removeprefix("torch."))
        return all(not a or h in a for a, h in zip(asked, has, strict=True))

    if options.pattern:
        variants = itertools.chain(*(of_pattern(p, options.documents) for p in options.pattern))
    else:
        variants = shipped() if options.shipped else search_space()
    variants = list(filter(is_wanted, variants))
    start = time.perf_counter()
    print(f"triton {triton.__version__}, {len(variants)} variants", flush=True)
    total = Counter()
    for variant, result in zip(variants, _compile_all(variants, options.processes), strict=True):
        total += report(variant, result, must_fit=options.shipped)
    print(
        f"{total['ok']} kernels compiled, {total['spilling']} spill, {total['no room']} have no "
        f"room, {total['FAILED']} failed; {time.perf_counter() - start:.0f} s"
    )
    return int(total["FAILED"] > 0)


def _compile_all(variants: list[Variant], processes: int) -> Iterator[list[Compiled] | str]:
    if processes == 1:
        yield from map(compile_variant, variants)
        return
    # Spawned, so that no worker inherits what torch and triton have set up.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_variant, variants)


if __name__ == "__main__":
    sys.exit(main())
