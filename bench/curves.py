"""Draw the learning curves of runs:  python -m bench.curves runs/A runs/B --output curves.png"""

import argparse
import json
from itertools import accumulate, pairwise
from pathlib import Path

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
    top = 0.0
    for folder in folders:
        measure, tokens, minutes, bits = curve(folder)
        top = max(top, bits[len(bits) // 10])  # the steep beginning would hide the rest
        for axes, x in zip(panels, (tokens, minutes), strict=True):
            axes.plot(x, bits, label=folder.name, linewidth=1)
    for axes, label in zip(panels, ("million training tokens", "minutes"), strict=True):
        axes.set(xlabel=label, ylim=(None, top))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(measure.replace("train/", "training ").replace("_", " "))
    panels[0].legend()
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    draw(arguments.runs, arguments.output)


if __name__ == "__main__":
    main()
