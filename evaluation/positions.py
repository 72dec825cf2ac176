"""What context is worth: bits by position in the window, as a picture."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.likelihood import Likelihood
from evaluation.measures import MEASURES

BINS_PER_OCTAVE = 4
FEWEST = 1000  # bytes or dimensions in a bin: the mean of fewer says little


def bits_by_position(
    result: Likelihood, measure: str
) -> tuple[list[float], list[float], list[int]]:
    """Bits per unit in bins whose width grows with the position.

    Args:
        result: sums by position.
        measure: a name of `MEASURES`.

    Returns:
        For each bin its middle in tokens (the first position is 1), the bits, and the units.
        Bins of fewer than 1,000 units are left out: with a stride below the context, few windows
        score their first positions.
    """
    context = len(result.nats)
    count = 1 + int(BINS_PER_OCTAVE * np.log2(context))
    edges = np.unique(np.round(2 ** (np.arange(count) / BINS_PER_OCTAVE)).astype(int))
    nats, units = (np.add.reduceat(x, edges - 1) for x in (result.nats, result.units))
    middles = np.sqrt(edges * np.append(edges[1:], context + 1))
    kept = [n for n in range(len(edges)) if units[n] >= FEWEST]
    bits = [MEASURES[measure](nats[n], units[n]) for n in kept]
    return middles[kept].tolist(), bits, units[kept].tolist()


def draw_positions(result: Likelihood, measure: str, path: Path) -> Path:
    """Draw `bits_by_position` to a PNG file, whose folder must exist."""
    middles, bits, _ = bits_by_position(result, measure)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(middles, bits, marker=".")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the context, tokens", ylabel=measure.replace("_", " "))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    return path
