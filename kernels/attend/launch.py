"""`attend` by the Triton kernels: what is launched for each pass, forward and backward."""

import functools
import threading
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attend.backward import key_kernel, query_kernel, sum_pieces_kernel
from kernels.attend.forward import forward_kernel, merge_pieces_kernel
from kernels.attend.passes import Pass, chains, whole
from kernels.attend.tuning import LONG, Config, config_for, forced_now
from kernels.attend.work import Work, make_work, rule_and_table, work_of
from kernels.common.interpreter import INTERPRETED
from kernels.common.primitives import CLASSES, GATHERED, PLAIN
from kernels.patterns import Pattern
from kernels.patterns.algebra import Nothing
from kernels.patterns.order import Order
from kernels.patterns.tiles import TileList

MERGED_ROWS, MERGED_PIECES = 4, 16  # what the kernels that merge read: tokens, pieces at a time


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of ``attend`` besides q, k and v."""

    pattern: Pattern
    scale: float
    documents: Tensor | None = None
    q_position: Tensor | None = None
    k_position: Tensor | None = None
    tiles: TileList | None = None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, out_dtype: torch.dtype):
    """``(out, lse)`` of ``kernels.attend.attend``."""
    launcher = _Launcher(q, k, v, call)
    out, lse = empty_output(q, v, out_dtype), q.new_empty(q.shape[:3], dtype=torch.float32)
    for chain in launcher.chains:
        # What a pass hands to the next is float32; only the last one rounds.
        between = empty_output(q, v, torch.float32) if len(chain) > 1 else None
        for n, part in enumerate(chain):
            target = out if n == len(chain) - 1 else between
            launcher.forward(part, target, between if n else None, lse)
    return out, lse


def backward(dout: Tensor, dlse: Tensor | None, q, k, v, out: Tensor, lse: Tensor, call: Call):
    """``(dq, dk, dv)`` from the gradients of ``out`` and ``lse`` (None if that was not used)."""
    launcher = _Launcher(q, k, v, call)
    dq, dk, dv = map(empty_gradient, (q, k, v))
    if not all(any(part.covers_keys for part in chain) for chain in launcher.chains):
        dk.zero_()  # no pass writes the keys between the columns
        dv.zero_()
    # What every pass needs of each query: the sum of dout * out, less dlse, and the lse in base 2.
    kept = torch.empty_like(lse), torch.empty_like(lse)
    for chain in launcher.chains:
        _chained_queries(launcher, chain, dout, dlse, out, lse, kept, dq)
    if len(launcher.chains) == 1 or launcher.heads == launcher.kv_heads:
        for chain in launcher.chains:
            _chained_keys(launcher, chain, dout, kept, dk, dv)
    else:  # chains share key heads: they add to one sum
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in (dk, dv)]
        for chain in launcher.chains:
            for part in chain:
                launcher.keys(part, dout, kept, *sums, sums)
        dk.copy_(sums[0])
        dv.copy_(sums[1])
    return dq, dk, dv


def _chained_queries(launcher, chain: tuple[Pass, ...], dout, dlse, out, lse, kept, dq) -> None:
    """Gradient of the queries of one chain; the first pass fills ``kept``, the last one rounds."""
    between = torch.empty_like(dq, dtype=torch.float32) if len(chain) > 1 else None
    for n, part in enumerate(chain):
        target = dq if n == len(chain) - 1 else between
        launcher.queries(part, dout, dlse, out, lse, kept, target, between if n else None)


def _chained_keys(launcher, chain: tuple[Pass, ...], dout, kept, dk, dv) -> None:
    """Gradients of the keys of one chain; the last pass covers all keys, and rounds."""
    parts = sorted(chain, key=lambda part: part.covers_keys)
    sums = prior = None
    if len(parts) > 1:
        make = torch.empty_like if parts[0].covers_keys else torch.zeros_like
        sums = [make(x, dtype=torch.float32) for x in (dk, dv)]
        prior = None if parts[0].covers_keys else sums
    for part in parts[:-1]:
        launcher.keys(part, dout, kept, *sums, prior)
        prior = sums
    launcher.keys(parts[-1], dout, kept, dk, dv, prior)


def empty_output(q: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, H, L, Dv)`` in ``(B, L, H, Dv)`` memory, so that joining the heads copies nothing."""
    B, H, L, _ = q.shape
    return q.new_empty((B, L, H, v.shape[3]), dtype=dtype).transpose(1, 2)


def empty_gradient(x: Tensor) -> Tensor:
    """Room for the gradient of ``x (B, H, L, D)``, in its layout if D is contiguous there."""
    dx = torch.empty_like(x)
    if dx.stride(3) == 1:
        return dx
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _Setup:
    """What a launch needs whatever the inputs hold; made once for a pass and its sizes."""

    config: Config
    work: Work
    heads: int  # that are launched: query heads, or key heads for the gradient of keys
    head_of: Tensor | None  # which ones, None for all
    sharing: Tensor | None
    table: Tensor
    counts: tuple[int, ...]
    meta: dict

    def arguments(self, call: Call, q: Tensor, k: Tensor) -> tuple:
        """What all three kernels take behind the strides of their tensors."""
        return (
            self.work.items, self.work.entries, self.table, self.head_of, call.documents,
            call.q_position, call.k_position, _strides(call.q_position, q),
            _strides(call.k_position, k), self.counts[0], call.scale, *self.counts[1:],
        )  # fmt: skip


class _Launcher:
    """The kernels over one set of inputs; each method launches one pass."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: Call):
        _bind_context(q.device)
        self.q, self.k, self.v, self.call = q, k, v, call
        self.batch, self.heads, self.kv_heads = len(q), q.shape[1], k.shape[1]
        self.chains = _chains(call.pattern, self.heads, k.shape[2], call.tiles is not None)

    def forward(self, part: Pass, out: Tensor, prior: Tensor | None, lse: Tensor) -> None:
        """Attend, merged with ``prior`` and what ``lse`` holds if there is a prior."""
        setup = self._setup(part, "forward")
        config, work, meta = setup.config, setup.work, setup.meta
        tma, k, v = _tile_sources(part.k_order, setup, config.keys, self.k, self.v)
        size = (self.batch * setup.heads * work.slots, config.queries)
        pieces, pieces_lse = _pieces(work, q := self.q, (*size, self.v.shape[3]), size)
        forward_kernel[(len(work) * self.batch * setup.heads,)](
            q, k, v, out, lse, prior, pieces, pieces_lse,
            q.stride(), self.k.stride(), self.v.stride(), out.stride(),
            self.heads // self.kv_heads, *setup.arguments(self.call, q, self.k), **meta, TMA=tma,
        )  # fmt: skip
        if work.slots:
            chunks = work.cuts * config.queries // MERGED_ROWS
            merge_pieces_kernel[(chunks * self.batch * setup.heads,)](
                out, lse, prior, pieces, pieces_lse, out.stride(), work.cut, setup.head_of,
                self.heads, setup.heads, work.cuts, work.slots, work.rows, q.shape[2],
                part.q_order.step, meta["Q_ORDER"], config.queries, meta["DV"], meta["BLOCK_DV"],
                MERGED_ROWS, MERGED_PIECES,
            )  # fmt: skip

    def queries(self, part, dout, dlse, out, lse, kept, dq: Tensor, prior: Tensor | None) -> None:
        """Gradient of the queries, added to ``prior``; the first pass of a chain fills ``kept``."""
        setup = self._setup(part, "queries")
        config, work, q = setup.config, setup.work, self.q
        tma, k, v = _tile_sources(part.k_order, setup, config.keys, self.k, self.v)
        size = (self.batch * setup.heads * work.slots, config.queries, q.shape[3])
        (pieces,) = _pieces(work, q, size)
        query_kernel[(len(work) * self.batch * setup.heads,)](
            q, k, v, out, dout, lse, dlse, *kept, dq, prior, pieces,
            q.stride(), self.k.stride(), self.v.stride(), out.stride(), dout.stride(), dq.stride(),
            self.heads // self.kv_heads, *setup.arguments(self.call, q, self.k), **setup.meta,
            TMA=tma,
        )  # fmt: skip
        if work.slots:
            order = (1, part.q_order.step, 0, setup.meta["Q_ORDER"])
            _sum_pieces(dq, prior, pieces, setup, self.batch, order, setup.meta["BLOCK_D"])

    def keys(self, part, dout, kept, dk: Tensor, dv: Tensor, prior) -> None:
        """Gradients of keys and values, added to ``prior``, a pair."""
        setup = self._setup(part, "keys")
        config, work, q = setup.config, setup.work, self.q
        tma, q_source, dout_source = _tile_sources(part.q_order, setup, config.queries, q, dout)
        size = (self.batch * setup.heads * work.slots, config.keys)
        pieces = _pieces(work, q, (*size, dk.shape[3]), (*size, dv.shape[3]))
        priors = prior or (None, None)
        key_kernel[(len(work) * self.batch * setup.heads,)](
            q_source, self.k, self.v, dout_source, *kept, dk, dv, *priors, *pieces,
            q.stride(), self.k.stride(), self.v.stride(), dout.stride(), dk.stride(), dv.stride(),
            setup.sharing, *setup.arguments(self.call, q, self.k), **setup.meta, TMA=tma,
            SHARED=1 if setup.sharing is None else setup.sharing.shape[1],
        )  # fmt: skip
        if work.slots:
            order = part.k_order
            order = (order.run, order.step, order.first, setup.meta["K_ORDER"])
            blocks = setup.meta["BLOCK_D"], setup.meta["BLOCK_DV"]
            for dx, before, x, block in zip((dk, dv), priors, pieces, blocks, strict=True):
                _sum_pieces(dx, before, x, setup, self.batch, order, block)

    def _setup(self, part: Pass, direction: str) -> _Setup:
        q, k, v, tiles = self.q, self.k, self.v, self.call.tiles
        sizes = (self.heads, self.kv_heads, q.shape[2], k.shape[2], q.shape[3], v.shape[3])
        if tiles is None:
            return _make_setup(part, direction, *sizes, q.dtype, q.device, forced_now())
        return _make_setup.__wrapped__(part, direction, *sizes, q.dtype, q.device, (), tiles)


_thread = threading.local()


def _bind_context(device: torch.device) -> None:
    """Make the card's context current in this thread, once.

    Autograd runs the backward pass in a thread of its own. A descriptor may be the first thing that
    it asks of the driver, which refuses it without a context; a kernel of torch brings one.
    """
    if device.type == "cuda" and getattr(_thread, "device", None) != device:
        torch.zeros(1, device=device)
        _thread.device = device


@functools.lru_cache(maxsize=256)
def _chains(pattern: Pattern, heads: int, keys: int, listed: bool) -> list[tuple[Pass, ...]]:
    """The chains of passes; a sequence may be too short to have any summary column.

    Where that leaves a chain without passes, one that shows nothing writes its results.
    """
    split = whole if listed else chains
    return [
        tuple(p for p in chain if p.k_order.longest(keys)) or (Pass(Nothing(), chain[0].heads),)
        for chain in split(pattern, heads)
    ]


@functools.lru_cache(maxsize=1024)
def _make_setup(
    part: Pass, direction: str, heads: int, kv_heads: int, queries: int, keys: int, D: int, DV: int,
    dtype: torch.dtype, device: torch.device, _forced: tuple, tiles: TileList | None = None,
) -> _Setup:  # fmt: skip
    # What is forced is asked for below by `config_for`; as an argument it keeps setups apart.
    inverse, group_size = direction == "keys", heads // kv_heads
    kind = direction, max(D, DV), dtype, device
    if tiles is not None:
        work = make_work(tiles.inverse() if inverse else tiles, device)
        config = Config(*tiles.tile, 8 if tiles.tile[0] * tiles.tile[1] >= 128 * 128 else 4, 2)
    else:
        slots = part.q_order.longest(queries), part.k_order.longest(keys)
        config = config_for(*kind).fit(*slots)
        work = work_of(part, heads, queries, keys, config.tile, inverse, device)
        if work.mean_tiles * config.tile[not inverse] >= LONG:
            config = config_for(*kind, "long").fit(*slots)
            work = work_of(part, heads, queries, keys, config.tile, inverse, device)
    rule, table = rule_and_table(part, heads, max(queries, keys), device)
    launched, everyone = part.heads, tuple(range(heads))
    if inverse:
        launched = tuple(sorted({head // group_size for head in part.heads}))
        everyone = everyone[:kv_heads]
    counts = (
        table.stride(0) if len(table) > 1 else 0, heads, len(launched), len(work), work.slots,
        work.rows, queries, keys, part.q_order.step, part.k_order.run, part.k_order.step,
        part.k_order.first,
    )  # fmt: skip
    meta = {
        "RULE": rule,
        "PER_HEAD": work.differs_by_head,
        "Q_ORDER": _kind(part.q_order),
        "K_ORDER": _kind(part.k_order),
        "BLOCK_I": config.queries,
        "BLOCK_J": config.keys,
        "D": D,
        "DV": DV,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_DV": max(16, triton.next_power_of_2(DV)),
        "CUT": work.slots > 0,
        "STAGES": config.stages,
        "PRECISION": "ieee",
        "num_warps": config.warps,
    }
    head_of = None if launched == everyone else _numbers(launched, device)
    sharing = _sharing(part.heads, group_size, device)
    return _Setup(config, work, len(launched), head_of, sharing, table, counts, meta)


def _pieces(work: Work, x: Tensor, *shapes: tuple[int, ...]) -> list[Tensor | None]:
    """Room for the results of the pieces of rows that are cut."""
    if not work.slots:
        return [None] * len(shapes)
    return [x.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _sum_pieces(dx, prior, pieces, setup: _Setup, batch: int, order: tuple, block_d: int) -> None:
    work = setup.work
    _, block, size = pieces.shape
    sum_pieces_kernel[(work.cuts * batch * setup.heads * block // MERGED_ROWS,)](
        dx, prior, pieces, dx.stride(), work.cut, setup.head_of, setup.heads, work.cuts,
        work.slots, work.rows, dx.shape[2], *order, block, size, block_d,
        MERGED_ROWS, MERGED_PIECES,
    )  # fmt: skip


def _kind(order: Order) -> int:
    if order.run > 1 or order.first:
        return GATHERED.value
    return (PLAIN if order.step == 1 else CLASSES).value


def _tile_sources(order: Order, setup: _Setup, rows: int, x: Tensor, y: Tensor):
    """What the loop over tiles loads from: descriptors for the copy engine, or the tensors.

    Returns:
        Whether it is the copy engine (Hopper's TMA, which needs 16-byte strides, and whole blocks
        if the tokens are in an order of their own), and what stands for ``x`` and ``y``.
    """
    # In float32 the products are no tensor-core instructions, and need all registers as it is:
    # with descriptors the dQ kernel at D=128 spills 5,632 bytes a thread.
    if not _has_copy_engine(x.device) or x.dtype == torch.float32:
        return False, x, y
    meta, sources = setup.meta, []
    for t, columns in ((x, meta["BLOCK_D"]), (y, meta["BLOCK_DV"])):
        box = _box(tuple(t.shape), t.stride(), t.element_size(), order, rows, columns)
        if box is None or t.data_ptr() % 16:
            return False, x, y
        sources.append(TensorDescriptor(t, *box))
    return True, *sources


@functools.cache
def _has_copy_engine(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(maxsize=1024)
def _box(shape, stride, size: int, order: Order, rows: int, columns: int):
    """Shape, strides and box of a descriptor of ``(B, H, tokens, D)``, None if there can be none.

    Args:
        size: bytes of a number.
        rows, columns: tokens and numbers of a tile.
    """
    B, H, L, D = shape
    whole = L % order.step == 0 and rows % order.run == 0 and order.run & (order.run - 1) == 0
    steps = [s * size for n, s in zip(shape[:3], stride[:3], strict=True) if n > 1]
    aligned = all(0 < s < 2**40 and s % 16 == 0 for s in steps) and D * size >= 16
    if not (whole and aligned and stride[3] == 1):
        return None
    # The stride of a dimension of one is never used, but must be valid.
    b, h, t = (s if n > 1 else 16 for n, s in zip(shape[:3], stride[:3], strict=True))
    if order == Order():
        return [B, H, L, D], [b, h, t, 1], [1, 1, rows, columns]
    blocks = [B, H, L // order.step, order.step, D]
    tokens = rows // order.run
    return blocks, [b, h, t * order.step, t, 1], [1, 1, tokens, order.run, columns]


def _strides(position: Tensor | None, x: Tensor) -> tuple[int, int, int]:
    """Strides of a position tensor broadcast to ``(B, H, L)`` of ``x``."""
    return (0, 0, 0) if position is None else position.expand(x.shape[:3]).stride()


@functools.lru_cache(maxsize=256)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def _sharing(heads: tuple[int, ...], group_size: int, device: torch.device) -> Tensor | None:
    """The query heads among ``heads`` of each key head, ``(key heads, most)``, padded with -1."""
    if group_size == 1:
        return None
    groups: dict[int, list[int]] = {}
    for head in heads:
        groups.setdefault(head // group_size, []).append(head)
    most = max(map(len, groups.values()))
    rows = [groups[key] + [-1] * (most - len(groups[key])) for key in sorted(groups)]
    return torch.tensor(rows, dtype=torch.int32, device=device)
