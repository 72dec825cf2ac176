"""Which cells layers show, and how far information travels through layers of them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.patterns import Pattern
from models.attention import Chosen

TILE = 32  # tokens; small tiles leave few cells to look at


def visible_cells(visible: Pattern | Chosen, length: int, heads: int = 1) -> Tensor:
    """All cells that a layer shows, ``(heads, L, L)`` bool.

    Those of a pattern come from the tiles that the kernels visit: of a tile that is listed as full
    no cell is looked at, as in the kernels.

    Args:
        visible: a pattern, or what was chosen for a text of ``length`` tokens.
        length: number of tokens.
        heads: number of heads; the result of a pattern has one if they see alike.
    """
    if isinstance(visible, Chosen):
        return visible.cells
    return _cells_of_tiles(visible, length, heads)


def first_cells(visible: Pattern | Chosen, tokens: int, length: int) -> Tensor:
    """What the first head sees of the first ``tokens`` of ``length``: ``(tokens, tokens)`` bool."""
    if isinstance(visible, Chosen):
        return visible.cells[0]
    token = torch.arange(tokens)
    return visible.visible(token[:, None], token[None, :], length=length)


def _cells_of_tiles(pattern: Pattern, length: int, heads: int) -> Tensor:
    tiles = pattern.tiles(length, TILE, heads)
    row, column = tiles.rows().long(), tiles.keys.long()
    head, row = row // tiles.shape[0], row % tiles.shape[0]
    seen = tiles.full[:, None, None].repeat(1, TILE, TILE)
    partial = ~tiles.full
    if partial.any():
        slot = torch.arange(TILE)
        # The last tile reaches beyond the last token, where a pattern need not be defined.
        i, j = ((x[partial, None] * TILE + slot).clamp(max=length - 1) for x in (row, column))
        seen[partial] = pattern.visible(
            i[:, :, None], j[:, None, :], head[partial, None, None], length=length
        )
    cells = torch.zeros(tiles.heads, *tiles.shape, TILE, TILE, dtype=torch.bool)
    cells[head, row, column] = seen
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :length, :length]


def kinds_of_heads(cells: Tensor) -> Tensor:
    """The different ones among ``cells (heads, L, L)``, in order of their first head."""
    kinds: list[Tensor] = []
    for head in cells:
        if not any(torch.equal(head, kind) for kind in kinds):
            kinds.append(head)
    return torch.stack(kinds)


def first_reached(layers: Iterable[Tensor]) -> Tensor:
    """After how many layers each query first depends on each key, ``(L, L)`` uint8; 0 for never.

    Every token also depends on what the layer below made of it, through the residual stream.

    Args:
        layers: the cells that any head of each layer sees, first layer first, ``(L, L)`` bool each.
    """
    for number, seen in enumerate(layers, start=1):
        itself = torch.eye(len(seen), dtype=torch.bool)
        if number == 1:
            reached, first = itself, torch.zeros_like(seen, dtype=torch.uint8)
        reached = (seen | itself).float() @ reached.float() > 0
        first[reached & (first == 0)] = number
    return first
