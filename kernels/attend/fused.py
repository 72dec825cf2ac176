"""`attend` by the Triton kernels: what is launched for each pass, forward and backward."""

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attend.backward import key_kernel, query_kernel, sum_pieces_kernel
from kernels.attend.forward import forward_kernel, merge_pieces_kernel
from kernels.attend.plan import Pass, Work, chains, make_work, rule_and_table, whole, work_of
from kernels.attend.tuning import LONG, Config, config_for
from kernels.interpreter import INTERPRETED
from kernels.patterns import Pattern
from kernels.primitives import CLASSES, GATHERED, PLAIN
from kernels.spans import Order
from kernels.tiles import TileList

ROWS, PIECES = 4, 16  # how the kernels that merge pieces read: tokens, and pieces at a time


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
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    # What every pass needs of each query: the sum of dout * out, less dlse, and the lse in base 2.
    kept = torch.empty_like(lse), torch.empty_like(lse)
    for chain in launcher.chains:
        between = torch.empty_like(dq, dtype=torch.float32) if len(chain) > 1 else None
        for n, part in enumerate(chain):
            target = dq if n == len(chain) - 1 else between
            launcher.queries(part, dout, dlse, out, lse, kept, target, between if n else None)
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


@dataclass(frozen=True, eq=False)
class _Setup:
    """What the launches of one pass and direction share."""

    config: Config
    work: Work
    heads: int
    head_of: Tensor | None
    arguments: tuple
    meta: dict


class _Launcher:
    """The kernels over one set of inputs; each method launches one pass."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: Call):
        self.q, self.k, self.v, self.call = q, k, v, call
        self.batch, self.heads, self.kv_heads = len(q), q.shape[1], k.shape[1]
        self.queries_number, self.keys_number = q.shape[2], k.shape[2]
        split = chains if call.tiles is None else whole
        # A sequence may be too short to have any summary column.
        self.chains = [
            tuple(part for part in chain if part.k_order.slots(self.keys_number))
            for chain in split(call.pattern, self.heads)
        ]

    def forward(self, part: Pass, out: Tensor, prior: Tensor | None, lse: Tensor) -> None:
        """Attend, merged with ``prior`` and what ``lse`` holds if there is a prior."""
        setup = self._prepare(part, "forward")
        config, work, heads = setup.config, setup.work, setup.heads
        tma, k, v = _tile_sources(part.k_order, setup, config.keys, self.k, self.v)
        size = (self.batch * heads * work.slots, config.queries)
        pieces = out.new_empty((*size, self.v.shape[3]), dtype=torch.float32)
        pieces_lse = out.new_empty(size, dtype=torch.float32)
        forward_kernel[(len(work) * self.batch * heads,)](
            self.q, k, v, out, lse, prior, pieces, pieces_lse,
            self.q.stride(), self.k.stride(), self.v.stride(), out.stride(),
            self.heads // self.kv_heads, *setup.arguments, **setup.meta, TMA=tma,
        )  # fmt: skip
        if work.slots:
            merge_pieces_kernel[(len(work.cut) * self.batch * heads * config.queries // ROWS,)](
                out, lse, prior, pieces, pieces_lse, out.stride(), work.cut, setup.head_of,
                self.heads, heads, len(work.cut), work.slots, work.rows, self.queries_number,
                part.q_order.step, setup.meta["Q_ORDER"], config.queries, setup.meta["DV"],
                setup.meta["BLOCK_DV"], ROWS, PIECES,
            )  # fmt: skip

    def queries(self, part, dout, dlse, out, lse, kept, dq: Tensor, prior: Tensor | None) -> None:
        """Gradient of the queries, added to ``prior``; the first pass of a chain fills ``kept``."""
        setup = self._prepare(part, "queries")
        config, work, heads = setup.config, setup.work, setup.heads
        tma, k, v = _tile_sources(part.k_order, setup, config.keys, self.k, self.v)
        size = (self.batch * heads * work.slots, config.queries, self.q.shape[3])
        pieces = dq.new_empty(size, dtype=torch.float32)
        query_kernel[(len(work) * self.batch * heads,)](
            self.q, k, v, out, dout, lse, dlse, *kept, dq, prior, pieces,
            self.q.stride(), self.k.stride(), self.v.stride(), out.stride(), dout.stride(),
            dq.stride(), self.heads // self.kv_heads, *setup.arguments, **setup.meta, TMA=tma,
        )  # fmt: skip
        if work.slots:
            order = (1, part.q_order.step, 0, setup.meta["Q_ORDER"])
            _sum_pieces(dq, prior, pieces, setup, self.batch, order)

    def keys(self, part, dout, kept, dk: Tensor, dv: Tensor, prior) -> None:
        """Gradients of keys and values, added to ``prior``, a pair."""
        setup = self._prepare(part, "keys")
        config, work, heads = setup.config, setup.work, setup.heads
        sharing = _sharing(part.heads, self.heads // self.kv_heads, self.q.device)
        tma, q, dout_source = _tile_sources(part.q_order, setup, config.queries, self.q, dout)
        size = (self.batch * heads * work.slots, config.keys)
        pieces = [x.new_empty((*size, x.shape[3]), dtype=torch.float32) for x in (dk, dv)]
        priors = prior or (None, None)
        key_kernel[(len(work) * self.batch * heads,)](
            q, self.k, self.v, dout_source, *kept, dk, dv, *priors, *pieces,
            self.q.stride(), self.k.stride(), self.v.stride(), dout.stride(), dk.stride(),
            dv.stride(), sharing, *setup.arguments, **setup.meta, TMA=tma,
            SHARED=1 if sharing is None else sharing.shape[1],
        )  # fmt: skip
        if work.slots:
            order = part.k_order
            order = (order.run, order.step, order.first, setup.meta["K_ORDER"])
            for dx, before, x in zip((dk, dv), priors, pieces, strict=True):
                _sum_pieces(dx, before, x, setup, self.batch, order)

    def _work(self, part: Pass, direction: str, inverse: bool) -> tuple[Config, Work]:
        """The configuration, and the tile list that fits it."""
        q, tiles, device = self.q, self.call.tiles, self.q.device
        kind = direction, max(q.shape[3], self.v.shape[3]), q.dtype, device
        if tiles is not None:
            warps = 8 if tiles.tile[0] * tiles.tile[1] >= 128 * 128 else 4
            listed = make_work(tiles.inverse() if inverse else tiles, device)
            return Config(*tiles.tile, warps, 2), listed
        sizes = self.queries_number, self.keys_number
        slots = part.q_order.slots(sizes[0]), part.k_order.slots(sizes[1])
        config = config_for(*kind).fit(*slots)
        work = work_of(part, self.heads, *sizes, config.tile, inverse, device)
        if work.mean_tiles * config.tile[not inverse] >= LONG:
            config = config_for(*kind, "long").fit(*slots)
            work = work_of(part, self.heads, *sizes, config.tile, inverse, device)
        return config, work

    def _prepare(self, part: Pass, direction: str) -> _Setup:
        call, device = self.call, self.q.device
        D, DV = self.q.shape[3], self.v.shape[3]
        sizes = self.queries_number, self.keys_number
        inverse = direction == "keys"
        config, work = self._work(part, direction, inverse)
        rule, table = rule_and_table(part, self.heads, max(sizes), device)
        own = part.heads
        if inverse:
            own = tuple(sorted({head // (self.heads // self.kv_heads) for head in own}))
        everyone = own == tuple(range(self.kv_heads if inverse else self.heads))
        head_of = None if everyone else _numbers(own, device)
        arguments = (
            work.items, work.entries, table, head_of, call.documents,
            call.q_position, call.k_position, _strides(call.q_position, self.q),
            _strides(call.k_position, self.k), table.stride(0) if len(table) > 1 else 0,
            call.scale, self.heads, len(own), len(work), work.slots, work.rows, *sizes,
            part.q_order.step, part.k_order.run, part.k_order.step, part.k_order.first,
        )  # fmt: skip
        meta = {
            "READ": rule.read,
            "SEEN": rule.seen,
            "PER_HEAD": work.differs_by_head,
            "Q_ORDER": _kind(part.q_order),
            "K_ORDER": _kind(part.k_order),
            "BLOCK_I": config.queries,
            "BLOCK_J": config.keys,
            "D": D,
            "DV": DV,
            "BLOCK_D": max(16, triton.next_power_of_2(D)),
            "BLOCK_DV": max(16, triton.next_power_of_2(DV)),
            "STAGES": config.stages,
            "PRECISION": "ieee",
            "num_warps": config.warps,
        }
        return _Setup(config, work, len(own), head_of, arguments, meta)


def _sum_pieces(dx: Tensor, prior, pieces: Tensor, setup: _Setup, batch: int, order: tuple) -> None:
    work = setup.work
    _, block, size = pieces.shape
    sum_pieces_kernel[(len(work.cut) * batch * setup.heads * block // ROWS,)](
        dx, prior, pieces, dx.stride(), work.cut, setup.head_of, setup.heads, len(work.cut),
        work.slots, work.rows, dx.shape[2], *order, block, size,
        max(16, triton.next_power_of_2(size)), ROWS, PIECES,
    )  # fmt: skip


def _kind(order: Order) -> int:
    if order.run > 1 or order.first:
        return GATHERED.value
    return (PLAIN if order.step == 1 else CLASSES).value


def _tile_sources(order: Order, setup: _Setup, rows: int, x: Tensor, y: Tensor):
    """What the loop over tiles loads from: descriptors for the copy engine, or the tensors.

    Returns:
        Whether it is the copy engine (Hopper's TMA, which needs 16-byte strides, and whole blocks if
        the tokens are in an order of their own), and what stands for ``x`` and ``y``.
    """
    whole = x.shape[2] % order.step == 0 and rows % order.run == 0 and order.run & (order.run - 1) == 0
    if not (whole and _has_copy_engine(x.device) and _is_aligned(x) and _is_aligned(y)):
        return False, x, y
    blocks = setup.meta["BLOCK_D"], setup.meta["BLOCK_DV"]
    return True, *(_descriptor(t, order, rows, d) for t, d in zip((x, y), blocks, strict=True))


@functools.cache
def _has_copy_engine(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (9, 0)


def _is_aligned(x: Tensor) -> bool:
    size = x.element_size()
    steps = (s * size for n, s in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1)
    return (
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and x.shape[3] * size >= 16
        and all(0 < step < 2**40 and step % 16 == 0 for step in steps)
    )


def _descriptor(x: Tensor, order: Order, rows: int, columns: int) -> TensorDescriptor:
    if order == Order():
        shape = [1, 1, rows, columns]
    else:  # (B, H, blocks, tokens of a block, D)
        x = x.unflatten(2, (-1, order.step))
        shape = [1, 1, rows // order.run, order.run, columns]
    # The stride of a dimension of one is never used, but must be valid.
    strides = [s if n > 1 else 16 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], shape)


def _strides(position: Tensor | None, x: Tensor) -> tuple[int, int, int]:
    """Strides of a position tensor broadcast to ``(B, H, L)`` of ``x``."""
    return (0, 0, 0) if position is None else position.expand(x.shape[:3]).stride()


@functools.lru_cache(maxsize=256)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def _sharing(heads: tuple[int, ...], group_size: int, device: torch.device) -> Tensor | None:
    """The query heads among ``heads`` of each key head, ``(key heads, most)``, filled up with -1."""
    if group_size == 1:
        return None
    groups: dict[int, list[int]] = {}
    for head in heads:
        groups.setdefault(head // group_size, []).append(head)
    most = max(map(len, groups.values()))
    rows = [groups[key] + [-1] * (most - len(groups[key])) for key in sorted(groups)]
    return torch.tensor(rows, dtype=torch.int32, device=device)
