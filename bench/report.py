"""What `bench.kernels` prints and writes: tables, all numbers as JSON, and the break-even plot."""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
import triton

DENSE = ("sdpa_cudnn", "sdpa_flash", "flash4_dense")
COLUMNS = (
    "implementation", "length", "fwd ms", "bwd ms", "fwd TF/s", "bwd TF/s", "fwd share",
    "bwd share", "peak GiB", "host us", "difference",
)  # fmt: skip


@dataclass
class Run:
    """All numbers of one run.

    Args:
        ceiling: TF/s of a large bfloat16 product of matrices.
        configs: head size -> direction -> queries, keys, warps, stages.
        rows: one for each pattern, length and implementation.
        planning: one for each pattern.
    """

    ceiling: float
    configs: dict
    rows: list[dict] = field(default_factory=list)
    planning: list[dict] = field(default_factory=list)
    started: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d-%H%M}")


def versions() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "command": " ".join([f"python -m bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def versions_line() -> str:
    return ", ".join(f"{name} {value}" for name, value in versions().items())


# ------------------------------------------------------------------------------ tables


def print_row(row: dict) -> None:
    print(row["pattern"].ljust(18), *(cell.ljust(12) for cell in _cells(row)), flush=True)


def print_tables(run: Run) -> None:
    print("\n".join(_markdown(run)))


def _cells(row: dict) -> list[str]:
    first = [row["implementation"], str(row["length"])]
    if "forward" not in row:
        return [*first, row.get("error", "?")]
    difference = f"{row['difference']:.1e}" if "difference" in row else ""
    return [
        *first, f"{row['forward']:.3f}", f"{row['backward']:.3f}", f"{row['forward_tflops']:.0f}",
        f"{row['backward_tflops']:.0f}", f"{row['forward_share']:.0%}",
        f"{row['backward_share']:.0%}", f"{row['peak']:.2f}",
        f"{row['host']:.0f}", difference or row.get("error", ""),
    ]  # fmt: skip


def _markdown(run: Run) -> list[str]:
    lines = [f"{versions_line()}; matmul ceiling {run.ceiling:.0f} TF/s", ""]
    for pattern in dict.fromkeys(row["pattern"] for row in run.rows):
        rows = [row for row in run.rows if row["pattern"] == pattern]
        lines += [f"### {pattern}", "", f"`{rows[0]['text']}`, D={rows[0]['head_size']}", ""]
        lines += [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
        for row in rows:
            cells = _cells(row)
            lines.append(_line(cells + [""] * (len(COLUMNS) - len(cells))))
        lines.append("")
    if run.planning:
        columns = list(dict.fromkeys(name for row in run.planning for name in row))
        lines += ["### planning", "", _line(columns), _line(["---"] * len(columns))]
        lines += [_line([_number(row.get(name, "")) for name in columns]) for row in run.planning]
        lines.append("")
    for pattern, (_, where) in break_even(run.rows).items():
        lines.append(f"- {pattern}: faster than dense, forward and backward, {where}")
    return lines


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------ break-even


def break_even(rows: list[dict]) -> dict[str, tuple[dict[int, float], str]]:
    """Pattern -> (length -> speed-up over the fastest dense kernel, from which length on)."""
    found = {}
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        speedups = {}
        for length in sorted({row["length"] for row in rows}):
            times = {
                row["implementation"]: row["forward"] + row["backward"]
                for row in rows
                if (row["pattern"], row["length"]) == (pattern, length) and "forward" in row
            }
            dense = [times[name] for name in DENSE if name in times]
            if dense and "ours" in times:
                speedups[length] = min(dense) / times["ours"]
        if speedups:
            found[pattern] = (speedups, _crossing(speedups))
    return found


def _crossing(speedups: dict[int, float]) -> str:
    """Where the speed-up passes 1 for good, interpolated between logarithms."""
    points = sorted(speedups.items())
    if points[-1][1] < 1:
        return f"at none of the lengths up to {points[-1][0]:,}"
    for (short, slow), (long, fast) in reversed(list(pairwise(points))):
        if slow < 1 <= fast:
            share = math.log(1 / slow) / math.log(fast / slow)
            return f"from {short * (long / short) ** share:,.0f} tokens on"
    return f"at every length from {points[0][0]:,} on"


def draw_break_even(run: Run, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for pattern, (speedups, _) in break_even(run.rows).items():
        axes.plot(list(speedups), list(speedups.values()), marker="o", markersize=3, label=pattern)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(
        xlabel="tokens of a sequence (65,536 tokens a call)",
        ylabel="speed-up over the fastest dense kernel, forward and backward",
        title=torch.cuda.get_device_name(),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


# ------------------------------------------------------------------------------ files


def write(run: Run, options) -> Path:
    """Write ``<kind>-<gpu>-<date>`` with .json, .md and, of several lengths, .png."""
    kind = "break-even" if options.break_even else "kernels"
    card = torch.cuda.get_device_name().replace(" ", "-").lower()
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{kind}-{card}-{run.started}"
    everything = {"versions": versions()} | asdict(run)
    stem.with_suffix(".json").write_text(json.dumps(everything, indent=1))
    stem.with_suffix(".md").write_text("\n".join(_markdown(run)) + "\n")
    if options.break_even:
        draw_break_even(run, stem.with_suffix(".png"))
    return stem.with_suffix(".md")
