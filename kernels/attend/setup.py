"""What a launch needs whatever the inputs hold; made once for a pass, a direction and its sizes."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.attend.call import Call
from kernels.attend.passes import Pass, chains, completed, in_one_pass
from kernels.attend.tuning import LONG as LONG_ROWS
from kernels.attend.tuning import Config, config_for, forced_now
from kernels.attend.visit import LONG, ROW, SHORT, Lists
from kernels.attend.work import (
    DocumentWork,
    ShortWork,
    Work,
    rule_and_table,
    short_work,
    work_of,
)
from kernels.common.kept import kept
from kernels.common.loads import GATHERED, LISTED, PLAIN, RESIDUES, TABLE_ENTRIES
from kernels.patterns import Pattern
from kernels.patterns.order import SEQUENCE, Listed, Order

REGISTERS_OF_THREE = 168  # a thread, where three programs of four warps share an SM


class Sizes(NamedTuple):
    """Of the tensors of one call."""

    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    D: int
    DV: int
    bytes: int  # of a number


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for.

    Args:
        Q_ORDER, K_ORDER: how indices map to tokens (``kernels.common.loads``).
        BLOCK_I, BLOCK_J: tokens of a tile of queries and of keys.
        D, DV: sizes of a head, and BLOCK_D, BLOCK_DV: padded to a power of two.
        PER_HEAD: every head has a list of its own.
        CUT: long rows are cut into parts.
        SHARED: the most query heads of those launched that share a key head.
        STAGES: of the pipeline that loads tiles.
        TILES: which tiles programs own (``kernels.attend.visit``).
    """

    Q_ORDER: int
    K_ORDER: int
    BLOCK_I: int
    BLOCK_J: int
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    PER_HEAD: bool
    CUT: bool
    SHARED: int
    STAGES: int
    TILES: int


@dataclass(frozen=True, eq=False)
class Setup:
    """The part of a kernel's arguments that is kept.

    Args:
        launch_heads: heads that are launched: of queries, or of keys for the gradient of keys.
        sharing: ``(key heads, SHARED)`` int32, the query heads of each key head, padded with -1;
            None if query head n has key head n.
        counts: what all three kernels take behind the scale.
        q_place, k_place: ``(run, step, first)`` of the orders of queries and keys; of listed tokens
            ``first`` is the table.
        compiled: keyword arguments that decide what is compiled.
        short: the setup for short documents, if this is that for long ones.
    """

    config: Config
    work: Work | DocumentWork | ShortWork
    lists: Lists
    launch_heads: int
    sharing: Tensor | None
    table: Tensor
    counts: tuple[int | Tensor, ...]
    q_place: tuple[int, int, int | Tensor]
    k_place: tuple[int, int, int | Tensor]
    constants: Constants
    compiled: dict
    short: "Setup | None" = None


@functools.lru_cache(maxsize=256)
def chains_of(
    pattern: Pattern,
    heads: int,
    num_queries: int,
    num_keys: int,
    is_listed: bool,
    packed: bool = False,
) -> list[tuple[Pass, ...]]:
    """The chains of passes; a sequence may be too short to have any summary column."""
    split = in_one_pass(pattern, heads) if is_listed else chains(pattern, heads, packed)
    return [completed(chain, num_queries, num_keys) for chain in split]


def setup_of(pass_: Pass, direction: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Setup:
    """The setup of one pass.

    Args:
        direction: one of ``kernels.attend.tuning.DIRECTIONS``.
    """
    lengths = q.shape[2], k.shape[2]
    sizes = Sizes(q.shape[1], k.shape[1], *lengths, q.shape[3], v.shape[3], q.element_size())
    if call.listed is None:
        return _planned(pass_, direction, sizes, q.dtype, q.device, forced_now())
    listed = call.listed
    area = listed.tile[0] * listed.tile[1]
    config = Config(*listed.tile, 8 if area >= 128 * 128 else 4, 2)
    work = listed.columns if direction == "dkv" else listed.rows
    return _make_setup(pass_, direction, sizes, q.device, config, work, _length(pass_, call, sizes))


def _length(pass_: Pass, call: Call, sizes: Sizes) -> int:
    """Tokens of the sequence that queries and keys are from, as far as tables must reach.

    Where there are tables, this waits for the positions that are given.
    """
    length = max(sizes.num_queries, sizes.num_keys)
    if not _has_table(pass_.pattern):
        return length
    given = [x for x in (call.q_position, call.k_position) if x is not None]
    return max([length, *(1 + int(x.max()) for x in given)])


def _has_table(pattern: Pattern) -> bool:
    return pattern.has_table or any(map(_has_table, pattern.operands))


@functools.lru_cache(maxsize=1024)
def _planned(
    pass_: Pass, direction: str, sizes: Sizes, dtype: torch.dtype, device: torch.device,
    _forced: tuple,
) -> Setup:  # fmt: skip
    # What is forced is asked for below by `config_for`; as an argument it keeps setups apart.
    heads, _, num_queries, num_keys, D, DV, _ = sizes
    kind = direction, max(D, DV), dtype, device
    lengths = pass_.q_order.longest(num_queries), pass_.k_order.longest(num_keys)
    inverse = direction == "dkv"
    config = config_for(*kind).fit(*lengths)
    work = work_of(pass_, heads, num_queries, num_keys, config.tile, inverse, device)
    if work.mean_tiles * config.tile[not inverse] >= LONG_ROWS:
        config = config_for(*kind, "long").fit(*lengths)
        work = work_of(pass_, heads, num_queries, num_keys, config.tile, inverse, device)
    length = max(num_queries, num_keys)
    return _make_setup(pass_, direction, sizes, device, config, work, length)


def _make_setup(
    pass_: Pass, direction: str, sizes: Sizes, device: torch.device, config: Config,
    work: Work | DocumentWork | ShortWork, length: int,
) -> Setup:  # fmt: skip
    heads, kv_heads, num_queries, num_keys, D, DV, _ = sizes
    kv_group = heads // kv_heads
    rule, table = rule_and_table(pass_, heads, length, device)
    sharing, launched, everyone = None, pass_.heads, tuple(range(heads))
    if direction == "dkv":
        sharing = _sharing(pass_.heads, kv_group, device)
        launched = tuple(sorted({head // kv_group for head in pass_.heads}))
        everyone = everyone[:kv_heads]
    head_of = None if launched == everyone else _numbers(launched, device)
    is_short, short = isinstance(work, ShortWork), None
    order = SEQUENCE if is_short else pass_.k_order
    q_place = _place(pass_.q_order, num_queries, device)
    k_place = _place(order, num_keys, device)
    counts = (
        table.stride(0) if len(table) > 1 else 0, kv_group, heads, len(launched), len(work),
        work.parts, work.rows, num_queries, num_keys, *q_place[1:], *k_place,
    )  # fmt: skip
    constants = Constants(
        Q_ORDER=_kind(pass_.q_order),
        K_ORDER=_kind(order),
        BLOCK_I=config.queries,
        BLOCK_J=config.keys,
        D=D,
        DV=DV,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        BLOCK_DV=max(16, triton.next_power_of_2(DV)),
        PER_HEAD=work.differs_by_head,
        CUT=work.parts > 0,
        SHARED=1 if sharing is None else sharing.shape[1],
        STAGES=config.stages,
        TILES=(SHORT if is_short else LONG if pass_.by_document else ROW).value,
    )
    compiled = {"RULE": rule, "C": constants, "num_warps": config.warps}
    is_small = max(constants.BLOCK_D, constants.BLOCK_DV) <= 64 and sizes.bytes <= 2
    if isinstance(work, DocumentWork) and direction != "dkv" and is_small and config.warps == 4:
        compiled["maxnreg"] = REGISTERS_OF_THREE  # left alone, the compiler takes more for nothing
    lists = Lists(getattr(work, "items", None), work.entries, head_of, work.offsets, work.room)
    if isinstance(work, DocumentWork):
        sides = config.tile if direction != "dkv" else config.tile[::-1]
        rest = short_work(num_queries, *sides, work.short, device)
        short = _make_setup(pass_, direction, sizes, device, config, rest, length)
    return Setup(
        config, work, lists, len(launched), sharing, table, counts, q_place, k_place, constants,
        compiled, short,
    )  # fmt: skip


def _place(order: Order, limit: int, device: torch.device) -> tuple[int, int, int | Tensor]:
    """``(run, step, first)`` of an order, as kernels take it."""
    is_listed = isinstance(order, Listed)
    return order.run, order.step, _listed(order, limit, device) if is_listed else order.first


@kept(maxsize=256)
def _listed(order: Listed, limit: int, device: torch.device) -> Tensor:
    """The listed tokens before a limit, filled up with the limit itself."""
    count = order.longest(limit)
    tokens = torch.full((triton.cdiv(count, TABLE_ENTRIES) * TABLE_ENTRIES,), limit)
    tokens[:count] = torch.tensor(order.positions[:count])
    return tokens.int().to(device)


def _kind(order: Order) -> int:
    if isinstance(order, Listed):
        return LISTED.value
    if order.run > 1 or order.first:
        return GATHERED.value
    return (PLAIN if order.step == 1 else RESIDUES).value


@kept(maxsize=256)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@kept(maxsize=256)
def _sharing(heads: tuple[int, ...], kv_group: int, device: torch.device) -> Tensor | None:
    """The query heads among ``heads`` of each key head, ``(key heads, most)``, padded with -1."""
    if kv_group == 1:
        return None
    sharing: dict[int, list[int]] = {}
    for head in heads:
        sharing.setdefault(head // kv_group, []).append(head)
    most = max(map(len, sharing.values()))
    rows = [sharing[key] + [-1] * (most - len(sharing[key])) for key in sorted(sharing)]
    return torch.tensor(rows, dtype=torch.int32, device=device)
