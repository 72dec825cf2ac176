"""Launching the kernels of `attend`: every pass of a pattern, forward and backward."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attend.backward import RowStats, dkv_kernel, dq_kernel
from kernels.attend.call import Call
from kernels.attend.descriptors import boxes_of
from kernels.attend.documents import first_tokens_of, plan_of
from kernels.attend.forward import forward_kernel
from kernels.attend.parts import merge_parts_kernel, sum_parts_kernel
from kernels.attend.passes import Pass
from kernels.attend.setup import Setup, chains_of, setup_of
from kernels.attend.visit import LONG, SHORT, Lists, Positions
from kernels.common.loads import view_of
from kernels.patterns.order import SEQUENCE, Order

MERGED_ROWS, MERGED_PARTS = 4, 16  # what the kernels that merge read: tokens, parts at a time


def forward(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of ``kernels.attend.attend``; the arguments are those of a flat ``Call``."""
    _bind_context(q.device)
    call = _with_first_tokens(Call.rebuild(*arguments))
    out, lse = empty_output(q, v, call.out_dtype), empty_lse(q)
    for chain in _chains(q, k, call):
        # What a pass hands to the next is float32; only the last one rounds.
        partial = empty_output(q, v, torch.float32) if len(chain) > 1 else None
        for n, pass_ in enumerate(chain):
            target = out if n == len(chain) - 1 else partial
            launch_forward(pass_, q, k, v, call, target, lse, partial if n else None)
    return out, lse


def backward(dout: Tensor, dlse: Tensor | None, q, k, v, out: Tensor, lse: Tensor, *arguments):
    """``(dq, dk, dv)`` from the gradients of ``out`` and ``lse`` (None if that was not used)."""
    _bind_context(q.device)
    call = _with_first_tokens(Call.rebuild(*arguments))
    dlse = dlse if dlse is None else dlse.contiguous()
    dq, dk, dv = map(empty_gradient, (q, k, v))
    chains = _chains(q, k, call)
    row_stats = RowStats(torch.empty_like(lse), torch.empty_like(lse))
    for chain in chains:
        partial = torch.empty_like(dq, dtype=torch.float32) if len(chain) > 1 else None
        for n, pass_ in enumerate(chain):
            target = dq if n == len(chain) - 1 else partial
            previous = partial if n else None
            launch_dq(pass_, q, k, v, call, out, dout, lse, dlse, row_stats, target, previous)
    covered = all(any(pass_.covers_keys for pass_ in chain) for chain in chains)
    if covered and (len(chains) == 1 or q.shape[1] == k.shape[1]):
        for chain in chains:
            _chained_dkv(chain, q, k, v, call, dout, row_stats, dk, dv)
    else:  # chains share key heads, or a pass writes some keys only: all add to one sum
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in (dk, dv)]
        for pass_ in (pass_ for chain in chains for pass_ in chain):
            launch_dkv(pass_, q, k, v, call, dout, row_stats, *sums, sums)
        dk.copy_(sums[0])
        dv.copy_(sums[1])
    return dq, dk, dv


def _with_first_tokens(call: Call) -> Call:
    """The call as kernels take it: a document is known by its first token, where it begins."""
    if call.documents is None:
        return call
    starts = first_tokens_of(call.documents)
    call = call._replace(documents=starts)
    if call.listed is None:
        return call
    counted = torch.arange(starts.shape[1], device=starts.device) - starts
    given = {"q_position": call.q_position, "k_position": call.k_position}
    return call._replace(**{n: counted[:, None] if x is None else x for n, x in given.items()})


def _chains(q: Tensor, k: Tensor, call: Call) -> list[tuple[Pass, ...]]:
    is_listed, packed = call.listed is not None, call.documents is not None
    return chains_of(call.pattern, q.shape[1], q.shape[2], k.shape[2], is_listed, packed)


def _chained_dkv(chain: tuple[Pass, ...], q, k, v, call, dout, row_stats, dk, dv) -> None:
    """Gradients of the keys of a chain in which a pass covers all keys: it is last, and rounds."""
    passes = sorted(chain, key=lambda pass_: pass_.covers_keys)
    sums = previous = None
    if len(passes) > 1:
        make = torch.empty_like if passes[0].covers_keys else torch.zeros_like
        sums = [make(x, dtype=torch.float32) for x in (dk, dv)]
        previous = None if passes[0].covers_keys else sums
    for pass_ in passes[:-1]:
        launch_dkv(pass_, q, k, v, call, dout, row_stats, *sums, previous)
        previous = sums
    launch_dkv(passes[-1], q, k, v, call, dout, row_stats, dk, dv, previous)


class _Launch(NamedTuple):
    """One launch of a kernel: of a pass there are two where documents have tiles of their own."""

    setup: Setup
    lists: Lists
    cut: Tensor | None  # rows whose parts are merged
    cuts: Tensor | None  # how many of them are, in each row of documents


def _launches(pass_: Pass, direction: str, q, k, v, call: Call) -> list[_Launch]:
    setup = setup_of(pass_, direction, q, k, v, call)
    if setup.short is None:
        return [_Launch(setup, setup.lists, setup.work.cut, None)]
    plan, short = plan_of(setup, pass_, call.documents, direction == "dkv"), setup.short
    return [
        _Launch(setup, setup.lists._replace(items=plan.long), plan.cut, plan.cuts),
        _Launch(short, short.lists._replace(items=plan.short, count=plan.count), None, None),
    ]


def launch_forward(pass_: Pass, q, k, v, call: Call, out, lse, previous: Tensor | None) -> None:
    """Attend, merged with ``previous`` and what ``lse`` holds if there is a pass before."""
    out, previous = view_of(out), view_of(previous)
    for launch in _launches(pass_, "forward", q, k, v, call):
        setup, C = launch.setup, launch.setup.constants
        programs = len(q) * setup.launch_heads
        boxes = _boxes(setup, pass_.k_order, C.BLOCK_J, k, C.BLOCK_D, v, C.BLOCK_DV)
        part_out = _empty_parts(setup, q, C.BLOCK_I, C.DV)
        part_lse = _empty_parts(setup, q, C.BLOCK_I, 1)
        forward_kernel[(len(setup.work) * programs,)](
            view_of(q), view_of(k), view_of(v), *boxes, out, lse, previous, part_out, part_lse,
            *_shared(launch, call, q, k), **setup.compiled,
        )  # fmt: skip
        if C.CUT:
            chunks = setup.work.cuts * C.BLOCK_I // MERGED_ROWS
            merge_parts_kernel[(chunks * programs,)](
                out, lse, previous, part_out, part_lse, launch.cut, launch.cuts,
                setup.lists.head_of, q.shape[1], *_counts_of_parts(setup, q), *setup.q_place,
                C.Q_ORDER, C.BLOCK_I, C.DV, C.BLOCK_DV, MERGED_ROWS, MERGED_PARTS,
            )  # fmt: skip


def launch_dq(
    pass_: Pass, q, k, v, call: Call, out, dout, lse, dlse, row_stats, dq, previous: Tensor | None
) -> None:  # fmt: skip
    """Gradient of the queries, added to ``previous``; the first pass fills ``row_stats``."""
    dq, previous = view_of(dq), view_of(previous)
    for launch in _launches(pass_, "dq", q, k, v, call):
        setup, C = launch.setup, launch.setup.constants
        boxes = _boxes(setup, pass_.k_order, C.BLOCK_J, k, C.BLOCK_D, v, C.BLOCK_DV)
        part_dq = _empty_parts(setup, q, C.BLOCK_I, C.D)
        dq_kernel[(len(setup.work) * len(q) * setup.launch_heads,)](
            view_of(q), view_of(k), view_of(v), *boxes, view_of(out), view_of(dout), lse, dlse,
            row_stats, dq, previous, part_dq, *_shared(launch, call, q, k), **setup.compiled,
        )  # fmt: skip
        if C.CUT:
            order = *setup.q_place, C.Q_ORDER, C.BLOCK_I, C.D, C.BLOCK_D
            _sum_parts(launch, q, dq, previous, part_dq, *order)


def launch_dkv(
    pass_: Pass, q, k, v, call: Call, dout, row_stats, dk, dv, previous: list[Tensor] | None
) -> None:  # fmt: skip
    """Gradients of keys and values, added to ``previous``, a pair."""
    dk, dv = view_of(dk), view_of(dv)
    previous_dk, previous_dv = map(view_of, previous or (None, None))
    for launch in _launches(pass_, "dkv", q, k, v, call):
        setup, C = launch.setup, launch.setup.constants
        boxes = _boxes(setup, pass_.q_order, C.BLOCK_I, q, C.BLOCK_D, dout, C.BLOCK_DV)
        part_dk = _empty_parts(setup, q, C.BLOCK_J, C.D)
        part_dv = _empty_parts(setup, q, C.BLOCK_J, C.DV)
        dkv_kernel[(len(setup.work) * len(q) * setup.launch_heads,)](
            view_of(q), view_of(k), view_of(v), *boxes, view_of(dout), row_stats,
            dk, dv, previous_dk, previous_dv, part_dk, part_dv, setup.sharing,
            *_shared(launch, call, q, k), **setup.compiled,
        )  # fmt: skip
        if C.CUT:
            place = *setup.k_place, C.K_ORDER, C.BLOCK_J
            _sum_parts(launch, k, dk, previous_dk, part_dk, *place, C.D, C.BLOCK_D)
            _sum_parts(launch, k, dv, previous_dv, part_dv, *place, C.DV, C.BLOCK_DV)


def _boxes(setup: Setup, order: Order, *tiles):
    """Descriptors of tiles; gathered tokens of a document may begin anywhere, where none fits."""
    if setup.constants.TILES == LONG and order != SEQUENCE:
        return None, None
    return boxes_of(SEQUENCE if setup.constants.TILES == SHORT else order, *tiles)


def _shared(launch: _Launch, call: Call, q: Tensor, k: Tensor) -> tuple:
    """What all three kernels take behind their tensors."""
    q_position = _positions(call.q_position, q)
    k_position = _positions(call.k_position, k)
    where = call.documents, q_position, k_position
    return (launch.lists, launch.setup.table, *where, call.scale, *launch.setup.counts)


def _positions(position: Tensor | None, x: Tensor) -> Positions | None:
    """A position tensor broadcast to ``(B, H, L)`` of ``x``."""
    return (
        position
        if position is None
        else Positions(position, *position.expand(x.shape[:3]).stride())
    )


def _empty_parts(setup: Setup, x: Tensor, block: int, size: int) -> Tensor | None:
    """Room for the results of the parts of rows that are cut."""
    if not setup.work.parts:
        return None
    parts = len(x) * setup.launch_heads * setup.work.parts
    return x.new_empty((parts, block, size), dtype=torch.float32)


def _sum_parts(
    launch: _Launch, x: Tensor, dx, previous, part_dx, run, step, first, order, block, *sizes
):
    """Add up the parts of ``dx``, a gradient of ``x``."""
    setup = launch.setup
    programs = setup.work.cuts * len(x) * setup.launch_heads * block // MERGED_ROWS
    sum_parts_kernel[(programs,)](
        dx, previous, part_dx, launch.cut, launch.cuts, setup.lists.head_of,
        *_counts_of_parts(setup, x), run, step, first, order, block, *sizes, MERGED_ROWS,
        MERGED_PARTS,
    )  # fmt: skip


def _counts_of_parts(setup: Setup, x: Tensor) -> tuple[int, ...]:
    work = setup.work
    return setup.launch_heads, work.cuts, work.parts, work.parts // 2, work.rows, x.shape[2]


def empty_output(q: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, H, L, Dv)`` in ``(B, L, H, Dv)`` memory, so that joining the heads copies nothing."""
    B, H, L, _ = q.shape
    return q.new_empty((B, L, H, v.shape[3]), dtype=dtype).transpose(1, 2)


def empty_lse(q: Tensor) -> Tensor:
    """``(B, H, L)`` float32."""
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def empty_gradient(x: Tensor) -> Tensor:
    """Room for the gradient of ``x (B, H, L, D)``, in its layout if D is contiguous there."""
    dx = torch.empty_like(x)
    if dx.stride(3) == 1:
        return dx
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


_thread = threading.local()


def _bind_context(device: torch.device) -> None:
    """Make the card's context current in this thread, once.

    Autograd runs the backward pass in a thread of its own. A descriptor may be the first thing that
    it asks of the driver, which refuses it without a context; a kernel of torch brings one.
    """
    if device.type == "cuda" and getattr(_thread, "device", None) != device:
        torch.zeros(1, device=device)
        _thread.device = device
