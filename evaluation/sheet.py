"""Sheets of square pictures, with captions and a key of their colours."""

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

INK, QUIET, PAPER, LINE = "#16263f", "#66707f", "#f4f5f7", "#c5cad3"
SEVERAL = "#8793a6"
TINTS = ["#e4803c", "#2f9e8f", "#b4508f", "#d9b23d", "#5a7fd6", "#8fb84a", "#d65a5a", "#7d5fb2"]
DEPTHS = LinearSegmentedColormap.from_list("depths", [INK, "#2f6fa3", "#8abbd8", "#d3e5f1"])
FEW = 4  # depths that have the same colours on every sheet

# Pixels: places of whole pixels keep cells sharp.
PANEL, GAP, BETWEEN, MARGIN = 512, 24, 72, 44
TITLE, NAME, CAPTION, TEXT, SWATCH, LINE_HEIGHT = 46, 36, 27, 26, 26, 44
LETTERS = PANEL / (0.602 * TEXT)  # of DejaVu Sans Mono, beside each other on a panel's width


@dataclass(frozen=True, eq=False)
class Panel:
    """A square picture.

    Args:
        colours: red, green and blue of every cell, ``(L, L, 3)`` uint8.
        caption: a line above it.
        name: a title above the caption; without one it belongs to the panel on its left.
        text: lines below it, such as the pattern.
        width: panels that the text may stretch over.
    """

    colours: np.ndarray
    caption: str
    name: str = ""
    text: str = ""
    width: int = 1

    @property
    def lines(self) -> list[str]:
        """The text, broken to the width, but not inside the brackets of a term."""
        whole = re.sub(r"\([^()]*\)", lambda term: term[0].replace(" ", "\u00a0"), self.text)
        width = int(self.width * LETTERS)
        return [line for part in whole.splitlines() for line in textwrap.wrap(part, width)]


def shade_kinds(kinds: Tensor) -> np.ndarray:
    """Colours of ``kinds (kinds, L, L)`` bool: which kinds of heads see what.

    Ink where all see the key, a tint where one kind does, grey where several do.
    """
    count = kinds.sum(dim=0)
    number = (count > 0).long()
    for n, kind in enumerate(kinds):
        number[kind & (count == 1)] = 3 + n % len(TINTS)
    number[count == len(kinds)] = 2
    return _rgb([PAPER, SEVERAL, INK, *TINTS])[number.numpy()]


def shade_depths(first: Tensor) -> np.ndarray:
    """Colours of ``first (L, L)``, numbers of layers: the more, the lighter; 0 is never."""
    return _rgb([PAPER, *_depths(int(first.max()))])[first.long().numpy()]


def key_of_kinds(kinds: int) -> list:
    """What the colours of ``shade_kinds`` mean."""
    if kinds == 1:
        return ["seen by", [INK], "all heads"]
    tints = TINTS[:kinds]
    return ["seen by", [INK], "all heads", tints, "one kind of head", [SEVERAL], "several kinds"]


def key_of_depths(layers: int) -> list:
    """What the colours of ``shade_depths`` mean."""
    key = ["reached after"]
    for n, colour in enumerate(_depths(layers), start=1):
        key += [[colour], f"{n}"]
    return [*key, "layers" if layers > 1 else "layer"]


def draw_sheet(
    panels: Sequence[Panel], path: Path, columns: int, keys: Sequence[list] = (), title: str = ""
) -> None:
    """Write a PNG file of panels, row by row.

    Args:
        panels: what to show.
        path: where the file goes; its folder must exist.
        columns: panels of a row.
        keys: lines below the panels, each of texts and of lists of colours.
        title: a line above them.
    """
    rows = [panels[n : n + columns] for n in range(0, len(panels), columns)]
    heights = [_above(row) + PANEL + _below(row) for row in rows]
    width = 2 * MARGIN + max(_places(row)[-1] for row in rows) + PANEL
    top = MARGIN + (TITLE + 50 if title else 0)
    page = _Page(width, top + sum(heights) + LINE_HEIGHT * len(keys) + MARGIN)
    page.text(MARGIN, MARGIN + TITLE, title, TITLE, INK, weight="bold")
    for row, height in zip(rows, heights, strict=True):
        for place, panel in zip(_places(row), row, strict=True):
            x, y = MARGIN + place, top + _above(row)
            page.text(x, top + NAME, panel.name, NAME, INK, weight="bold")
            page.text(x, y - 18, panel.caption, CAPTION)
            page.image(x, y, panel.colours)
            for n, line in enumerate(panel.lines, start=1):
                page.text(x, y + PANEL + 6 + 33 * n, line, TEXT, family="monospace")
        top += height
    for n, key in enumerate(keys, start=1):
        page.key(MARGIN, top + LINE_HEIGHT * n, key)
    page.save(path)


def _places(row: Sequence[Panel]) -> list[int]:
    """Where panels begin, in pixels from the first."""
    gaps = [BETWEEN if panel.name else GAP for panel in row[1:]]
    return [n * PANEL + sum(gaps[:n]) for n in range(len(row))]


def _above(row: Sequence[Panel]) -> int:
    return 108 if any(panel.name for panel in row) else 52


def _below(row: Sequence[Panel]) -> int:
    return 48 + 33 * max(len(panel.lines) for panel in row)


class _Page:
    """A figure whose places are pixels from its top left corner."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
        FigureCanvasAgg(self.figure)  # one renderer for all texts; without, each makes its own

    def axes(self, x: int, y: int, size: int):
        left, bottom = x / self.width, 1 - (y + size) / self.height
        axes = self.figure.add_axes((left, bottom, size / self.width, size / self.height))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=LINE, linewidth=1)
        return axes

    def image(self, x: int, y: int, colours: np.ndarray) -> None:
        sharp = len(colours) <= PANEL
        self.axes(x, y, PANEL).imshow(colours, interpolation="nearest" if sharp else "antialiased")

    def text(self, x: int, y: int, text: str, height: int, color: str = QUIET, **style) -> float:
        """Write letters of a height on a line, and return how wide they are."""
        written = self.figure.text(
            x / self.width, 1 - y / self.height, text, color=color, fontsize=0.72 * height, **style
        )
        return written.get_window_extent().width

    def key(self, x: int, y: int, entries: list) -> None:
        for entry in entries:
            if isinstance(entry, str):
                x += round(self.text(x, y, entry, CAPTION)) + 18
                continue
            for colour in entry:
                self.axes(x, y - SWATCH + 3, SWATCH).set(facecolor=colour)
                x += SWATCH + 6
            x += 4

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=100)
        # Few colours in large areas: a palette halves the file.
        Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def _depths(layers: int) -> list[tuple[float, ...]]:
    return [DEPTHS(n / (max(layers, FEW) - 1))[:3] for n in range(layers)]


def _rgb(colours: Sequence) -> np.ndarray:
    return np.array([[round(255 * part) for part in to_rgb(c)] for c in colours], dtype=np.uint8)
