"""From tile lists to what programs do: items of work, and the entries they visit."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.attend.passes import Pass
from kernels.patterns.rule import Rule, rule_of, table_of
from kernels.patterns.tiles import TileList, list_tiles

# A row is cut into pieces of so many mean rows, but of no fewer tiles than this.
PIECE_ROWS, PIECE_TILES = 2, 16
ROWS_ON_CPU = 8192  # tiles of queries; a longer list is built on the device of the kernel


@dataclass(frozen=True, eq=False)
class Work:
    """A tile list as a kernel reads it: items for its programs, and the entries that they visit.

    Args:
        items: ``(heads or 1, work, 4)`` int32: row, first and last entry, and a slot for the result
            of a piece of a row (-1 for a whole row). Rows and slots are the same in every head.
        cut: ``(cut rows, 3)`` int32: row, first slot, pieces.
        slots: pieces of all cut rows.
        entries: tile number times two, plus one if the whole tile is visible, int32; one more at
            the end, because kernels read an entry ahead.
        rows: tiles of one group.
        tile_rows: rows of the list, over the groups and heads.
    """

    items: Tensor
    cut: Tensor
    slots: int
    entries: Tensor
    rows: int
    tile_rows: int

    def __len__(self) -> int:
        """Programs of one batch and head."""
        return self.items.shape[1]

    @property
    def cuts(self) -> int:
        """Rows that are cut."""
        return len(self.cut)

    @property
    def differs_by_head(self) -> bool:
        return len(self.items) > 1

    @property
    def mean_tiles(self) -> float:
        """Tiles that a row visits."""
        return (len(self.entries) - 1) / self.tile_rows


def make_work(tiles: TileList, device: torch.device) -> Work:
    """Cut rows with many tiles into pieces, longest rows first."""
    total, heads = tiles.shape[0], tiles.heads
    start = tiles.offsets[:-1].view(heads, total).long()
    count = tiles.offsets.diff().view(heads, total)
    longest = count.amax(dim=0)
    most = max(PIECE_TILES, PIECE_ROWS * (len(tiles) // (total * heads) + 1))
    row = longest.argsort(descending=True, stable=True)
    pieces = ((longest[row] + most - 1) // most).clamp(min=1)
    slots = torch.where(pieces > 1, pieces, 0).cumsum(0)
    first_slot = torch.where(pieces > 1, slots - pieces, -1)
    cut = torch.stack((row, first_slot, pieces), dim=1)[pieces > 1]
    which = torch.repeat_interleave(pieces)
    piece = torch.arange(len(which), device=row.device) - (pieces.cumsum(0) - pieces)[which]
    row, pieces, first_slot = row[which], pieces[which], first_slot[which]
    slot = torch.where(first_slot < 0, -1, first_slot + piece)
    low = start[:, row] + count[:, row] * piece // pieces
    high = start[:, row] + count[:, row] * (piece + 1) // pieces
    shared = (x.expand(heads, -1) for x in (row, slot))
    items = torch.stack((next(shared), low, high, next(shared)), dim=2)
    entries = torch.nn.functional.pad(tiles.keys * 2 + tiles.full, (0, 1))
    return Work(
        items.int().contiguous().to(device),
        cut.int().contiguous().to(device),
        int(slots[-1]),
        entries.int().to(device),
        total // tiles.residues,
        total * heads,
    )


@functools.lru_cache(maxsize=512)
def work_of(
    part: Pass, heads: int, queries: int, keys: int, tile: tuple[int, int], inverse: bool,
    device: torch.device,
) -> Work:  # fmt: skip
    """The work of one pass and direction, kept: every later call costs a look-up.

    Args:
        heads: heads of the model, over which a random plan is drawn.
        tile: tokens of a tile of (queries, keys).
        inverse: rows are tiles of keys, and their lists tiles of queries.
    """
    tiles = _tiles(part, heads, queries, keys, tile, device)
    return make_work(tiles.inverse() if inverse else tiles, device)


@functools.lru_cache(maxsize=64)
def _tiles(part, heads, queries, keys, tile, device) -> TileList:
    small = max(queries // tile[0], keys // tile[1]) <= ROWS_ON_CPU
    where = torch.device("cpu") if small else device
    residues = part.q_order.residues
    orders = part.q_order, part.k_order
    if residues > 1 and part.pattern.knows_distance_only:
        # The same list in every residue; residue 0 has the most tokens.
        orders = tuple(replace(order, residues=1) for order in orders)
        one = list_tiles(part.pattern, *orders, queries, keys, tile, heads, where)
        return _repeat(one, residues)
    return list_tiles(part.pattern, *orders, queries, keys, tile, heads, where)


def _repeat(tiles: TileList, residues: int) -> TileList:
    """The list of one residue, for every residue."""
    assert tiles.heads == 1, "what differs by head does not depend on the distance alone"
    count = tiles.offsets.diff().repeat(residues)
    offsets = torch.cat((count.new_zeros(1), count.cumsum(0)))
    shape = (tiles.shape[0] * residues, tiles.shape[1])
    numbers, full = tiles.keys.repeat(residues), tiles.full.repeat(residues)
    return TileList(offsets.int(), numbers, full, shape, tiles.tile, residues)


@functools.lru_cache(maxsize=512)
def rule_and_table(
    part: Pass, heads: int, length: int, device: torch.device
) -> tuple[Rule, Tensor]:
    """What a kernel needs to decide the cells of a partial tile."""
    return rule_of(part.pattern), table_of(part.pattern, length, heads, device)
