"""Draw the learning curves of runs:  python -m bench.curves runs/A runs/B --output curves.png"""

import argparse
import json
import math
from itertools import accumulate, pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def curve(folder: Path) -> tuple[str, list[float], list[float], list[float]]:
    """The measure, and million tokens, minutes of training and training loss at each logged step.

    Minutes are those of the logged throughput, so compilation in the first steps is in them.
    """
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    rows = [line for line in lines if "tokens_per_second" in line]
    measure = next(key for key in rows[0] if key.startswith("train/bits_per_"))
    minutes = [row["training_minutes"] for row in rows]
    spans = [b - a for a, b in pairwise([0.0, *minutes])]
    tokens = accumulate(
        row["tokens_per_second"] * 60 * span for row, span in zip(rows, spans, strict=True)
    )
    return measure, [n / 1e6 for n in tokens], minutes, [row[measure] for row in rows]


def draw(folders: list[Path], output: Path) -> None:
    """Two panels, over tokens and over minutes, with one line a run."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for column, (axes, label) in enumerate(
        zip(panels, ("million training tokens", "minutes"), strict=True)
    ):
        measure = _plot(axes, folders, column)
        axes.set_xlabel(label)
    panels[0].set_ylabel(f"training {measure}")
    panels[0].legend()
    figure.savefig(output, dpi=120)


def has_curve(folder: Path) -> bool:
    """Whether a run came so far that its speed was logged."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and "tokens_per_second" in metrics.read_text()


def draw_groups(groups: dict[str, list[Path]], output: Path) -> None:
    """A panel over minutes for each group of runs, with one line a run."""
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    for n, (title, folders) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(rows, columns, n)
        axes.set(title=title, ylabel=_plot(axes, folders, column=1))
        axes.legend(fontsize="small")
    figure.supxlabel("minutes of training")
    figure.savefig(output, dpi=90)


def _plot(axes: Axes, folders: list[Path], column: int) -> str:
    """One line a run, over tokens (column 0) or minutes (1); returns the name of the measure."""
    top = 0.0
    for folder in folders:
        measure, *x, bits = curve(folder)
        top = max(top, bits[len(bits) // 10])  # the steep beginning would hide the rest
        axes.plot(x[column], bits, label=folder.name, linewidth=1)
    axes.set_ylim(None, top)
    axes.grid(alpha=0.3)
    return measure.removeprefix("train/").replace("_", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    draw(arguments.runs, arguments.output)


if __name__ == "__main__":
    main()
