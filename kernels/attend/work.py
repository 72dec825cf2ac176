"""From tile lists to what programs do: items of work, and the entries they visit."""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from kernels.attend.passes import Pass
from kernels.common.kept import kept
from kernels.patterns.order import Listed
from kernels.patterns.rule_tree import Rule, rule_of, table_of
from kernels.patterns.tiles import TileList, list_tiles

# A row is cut into parts of so many mean rows, but of no fewer tiles than this.
PART_ROWS, PART_TILES = 2, 16
SHORT = 256  # a document of fewer tokens sees most of its tiles: it needs no list of them
ROWS_ON_CPU = 8192  # tiles of queries; a longer list is built on the device of the kernel


@dataclass(frozen=True, eq=False)
class Work:
    """A tile list as a kernel reads it: items for its programs, and the entries that they visit.

    Args:
        items: ``(heads or 1, work, 4)`` int32: row, first entry and one past the last, and the part
            that the result is (-1 for a whole row). Rows and parts are the same in every head.
        cut: ``(cut rows, 3)`` int32: row, first part, parts; no parts where it is filled up.
        entries: tile number times two, plus one if the whole tile is visible, int32; one more at
            the end, because kernels read an entry ahead.
        parts: of all cut rows.
        rows: tiles of one residue.
        list_rows: rows of the list, over the residues and heads.
    """

    items: Tensor
    cut: Tensor
    entries: Tensor
    parts: int
    rows: int
    list_rows: int
    offsets = room = None  # every program has an item, which says which entries are its own

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
        return (len(self.entries) - 1) / self.list_rows

    def trimmed(self) -> "Work":
        """The same without what only fills it up; waits for the device of the list."""
        cuts, parts = int((self.cut[:, 2] > 0).sum()), int(self.cut[:, 2].sum())
        work = self.list_rows // len(self.items) + parts - cuts
        items = self.items[:, :work].contiguous()
        return replace(self, items=items, cut=self.cut[:cuts], parts=parts)

    def to(self, device: torch.device) -> "Work":
        return _moved(self, device, "items", "cut", "entries")


@dataclass(frozen=True, eq=False)
class ListedWork:
    """A tile list of the caller's as the kernels of both directions read it, made once for a step.

    Args:
        tile: tokens of a tile of (queries, keys).
        rows: work whose rows are tiles of queries.
        columns: work whose rows are tiles of keys.
    """

    tile: tuple[int, int]
    rows: Work
    columns: Work

    @classmethod
    def of(cls, tiles: TileList, device: torch.device) -> "ListedWork":
        """Prepare a list without waiting for the GPU: sizes are bounds that the host knows."""
        rows, columns = (make_work(x).to(device) for x in (tiles, tiles.inverse()))
        return cls(tiles.tile, rows, columns)

    def flatten(self) -> tuple:
        """Tensors, and a list of numbers, as an operator takes them."""
        a, b = self.rows, self.columns
        sizes = [*self.tile, a.parts, a.rows, a.list_rows, b.parts, b.rows, b.list_rows]
        return a.items, a.cut, a.entries, b.items, b.cut, b.entries, sizes

    @classmethod
    def rebuild(cls, *flat) -> "ListedWork":
        """What was flattened."""
        *tensors, (tile_i, tile_j, *sizes) = flat
        return cls(
            (tile_i, tile_j), Work(*tensors[:3], *sizes[:3]), Work(*tensors[3:], *sizes[3:])
        )  # fmt: skip


def make_work(tiles: TileList, few_rows: bool = False) -> Work:
    """Cut rows with many tiles into parts, longest rows first.

    How many rows are cut is known to the device alone. So there is room for as many items and parts
    as there can be, and programs without a row of their own write to a part that nobody reads.

    Args:
        few_rows: too few to fill a card: long ones are cut though all be alike.
    """
    total, heads = tiles.shape[0], tiles.heads
    start = tiles.offsets[:-1].view(heads, total).long()
    count = tiles.offsets.diff().view(heads, total)
    longest = count.amax(dim=0)
    mean = 0 if few_rows else len(tiles) // (total * heads)
    most = max(PART_TILES, PART_ROWS * (mean + 1))
    # Parts behind the first one of a row: each but the last of a row has `most` tiles.
    extra = min(len(tiles) // most, total * ((tiles.shape[1] - 1) // most))
    most_cuts = min(total, extra)
    row = longest.argsort(descending=True, stable=True)
    parts = ((longest[row] + most - 1) // most).clamp(min=1)
    ends, is_cut = parts.cumsum(0), parts > 1
    first_part = torch.where(is_cut, torch.where(is_cut, parts, 0).cumsum(0) - parts, -1)
    cut = torch.stack((row, first_part, torch.where(is_cut, parts, 0)), dim=1)[:most_cuts]

    item = torch.arange(total + extra, device=row.device)
    which = torch.searchsorted(ends, item, right=True)
    exists, which = which < total, which.clamp(max=total - 1)
    number = item - (ends - parts)[which]
    row, parts, first_part = row[which], parts[which], first_part[which]
    part = torch.where(first_part < 0, -1, first_part + number)
    part = torch.where(exists, part, most_cuts + extra)
    low = start[:, row] + count[:, row] * number // parts
    high = torch.where(exists, start[:, row] + count[:, row] * (number + 1) // parts, low)
    row, part = (x.expand(heads, -1) for x in (row, part))
    items = torch.stack((row, low, high, part), dim=2)
    entries = torch.nn.functional.pad(tiles.keys * 2 + tiles.full, (0, 1))
    return Work(
        items.int(), cut.int(), entries.int(),
        most_cuts + extra + 1 if extra else 0, total // tiles.residues, total * heads,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class DocumentWork:
    """A tile list that serves all long documents of a row, each with tiles of its own.

    The list is that of one document as long as the row: a shorter one has its first rows, and of
    each the tiles that it reaches. `kernels.attend.documents.plan_of` makes items for programs from
    it and the documents, of which the host knows nothing but these bounds.

    Args:
        entries: see `Work`.
        offsets: where in ``entries`` the list of each row begins, ``(heads or 1, rows + 1)`` int32.
        longest: tiles of each row, the most of any head, ``(rows,)`` int32.
        most: tiles of a part, if rows are cut.
        long_rows: rows that a document as long as the row has cut.
        programs: most items of a row of documents.
        parts: most parts of cut rows; 0 if no row is cut.
        mean_tiles: that a row visits, of a document as long as the row.
        short: documents with fewer tokens are not long.
    """

    entries: Tensor
    offsets: Tensor
    longest: Tensor
    most: int
    long_rows: int
    programs: int
    parts: int
    mean_tiles: float
    short: int

    def __len__(self) -> int:
        """Programs of one batch and head."""
        return self.programs

    room = property(__len__)  # one item for each program

    @property
    def cuts(self) -> int:
        """Rows that are merged at a time: programs take those that are cut in turn."""
        return self.long_rows

    @property
    def rows(self) -> int:
        return len(self.longest)

    @property
    def differs_by_head(self) -> bool:
        return len(self.offsets) > 1

    def to(self, device: torch.device) -> "DocumentWork":
        return _moved(self, device, "entries", "offsets", "longest")


@dataclass(frozen=True, eq=False)
class ShortWork:
    """What is left of a row beside long documents: tiles of the row, which see all there is.

    Args:
        entries: the first tiles, none of them whole: a list for every row.
        programs: half as many as there may be items, since often there are few or none.
        room: most items of a row, its tiles.
    """

    entries: Tensor
    programs: int
    room: int
    offsets = None
    parts = cuts = 0
    rows = 1
    differs_by_head = False

    def __len__(self) -> int:
        """Programs of one batch and head, which take the items in turn."""
        return self.programs


def make_document_work(tiles: TileList, tokens: int) -> DocumentWork:
    """Prepare a list for long documents in rows of so many tokens."""
    own, other = tiles.tile
    short = max(SHORT, own)  # at most two long documents have tokens in a tile
    counts = tiles.offsets.diff().view(tiles.heads, -1)
    rows, longest = counts.shape[1], counts.amax(dim=0)
    first = tiles.offsets[:-1].view(tiles.heads, rows)
    offsets = torch.cat((first, (first + counts)[:, -1:]), dim=1)
    entries = torch.nn.functional.pad(tiles.keys * 2 + tiles.full, (0, 1))
    mean = len(tiles) / counts.numel()
    most = max(PART_TILES, PART_ROWS * (int(mean) + 1))
    long_rows = int((longest > most).sum())
    extra = long_rows * triton.cdiv(triton.cdiv(tokens, other), most)
    programs = _aligned(triton.cdiv(tokens, own) + tokens // short + extra)
    return DocumentWork(
        entries.int(), offsets.int(), longest.int(), most, long_rows, programs, 2 * extra, mean,
        short,
    )  # fmt: skip


@kept(maxsize=64)
def short_work(tokens: int, own: int, other: int, short: int, device: torch.device) -> ShortWork:
    """The work of short documents in rows of so many tokens, by the sides of tiles."""
    reach = triton.cdiv(own + 2 * short, other) + 1  # from the first document of a tile to the last
    entries = torch.arange(0, 2 * reach + 2, 2, dtype=torch.int32, device=device)
    tiles = triton.cdiv(tokens, own)
    return ShortWork(entries, triton.cdiv(tiles, 2), _aligned(tiles))


def _aligned(count: int) -> int:
    """Rounded up: Triton compiles another kernel for a number that 16 does not divide."""
    return triton.cdiv(count, 16) * 16


@kept(maxsize=512)
def work_of(
    pass_: Pass, heads: int, num_queries: int, num_keys: int, tile: tuple[int, int], inverse: bool,
    device: torch.device,
) -> Work | DocumentWork:  # fmt: skip
    """The work of one pass and direction, kept: every later call costs a look-up.

    Args:
        heads: heads of the model, over which random blocks are drawn.
        tile: tokens of a tile of (queries, keys).
        inverse: rows are tiles of keys, and their lists tiles of queries.
    """
    tiles = _tiles(pass_, heads, num_queries, num_keys, tile, device)
    tiles = tiles.inverse() if inverse else tiles
    if pass_.by_document:
        return make_document_work(tiles, num_queries).to(device)
    own = pass_.k_order if inverse else pass_.q_order
    return make_work(tiles, few_rows=isinstance(own, Listed)).trimmed().to(device)


def _moved(work, device: torch.device, *names: str):
    return replace(work, **{name: getattr(work, name).to(device) for name in names})


@kept(maxsize=64)
def _tiles(pass_, heads, queries, keys, tile, device) -> TileList:
    small = max(queries // tile[0], keys // tile[1]) <= ROWS_ON_CPU
    where = torch.device("cpu") if small else device
    residues = pass_.q_order.residues
    orders = pass_.q_order, pass_.k_order
    if residues > 1 and pass_.pattern.knows_distance_only:
        # The same list in every residue; residue 0 has the most tokens.
        orders = tuple(replace(order, residues=1) for order in orders)
        one = list_tiles(pass_.pattern, *orders, queries, keys, tile, heads, where)
        return _repeat(one, residues)
    return list_tiles(pass_.pattern, *orders, queries, keys, tile, heads, where)


def _repeat(tiles: TileList, residues: int) -> TileList:
    """The list of one residue, for every residue."""
    assert tiles.heads == 1, "what differs by head does not depend on the distance alone"
    count = tiles.offsets.diff().repeat(residues)
    offsets = torch.cat((count.new_zeros(1), count.cumsum(0)))
    shape = (tiles.shape[0] * residues, tiles.shape[1])
    numbers, full = tiles.keys.repeat(residues), tiles.full.repeat(residues)
    return TileList(offsets.int(), numbers, full, shape, tiles.tile, residues)


@kept(maxsize=512)
def rule_and_table(
    pass_: Pass, heads: int, length: int, device: torch.device
) -> tuple[Rule, Tensor]:
    """What a kernel needs to decide the cells of a partial tile."""
    return rule_of(pass_.pattern), table_of(pass_.pattern, length, heads, device)
