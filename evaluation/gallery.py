"""Pictures of attention patterns."""

from pathlib import Path

from matplotlib.figure import Figure

from kernels.patterns import Pattern

TOKENS = 1024  # the leading tokens that a picture shows


def draw_patterns(patterns: dict[str, Pattern], length: int, path: Path) -> Path:
    """Draw the first head of each pattern, queries down and keys to the right, to a PNG file.

    Args:
        patterns: name -> pattern, one panel each.
        length: tokens of the sequence; at most the first 1,024 are drawn.
        path: where the file goes; its folder must exist.
    """
    shown = min(length, TOKENS)
    figure = Figure(figsize=(5 * len(patterns), 5.6), layout="constrained")
    for n, (name, pattern) in enumerate(patterns.items(), start=1):
        axes = figure.add_subplot(1, len(patterns), n)
        # A bidirectional random plan depends on the length, so the whole is evaluated.
        cells = pattern.dense(length if not pattern.is_causal else shown)[:shown, :shown]
        axes.imshow(cells.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        keys = pattern.keys_per_query(length)
        axes.set_title(f"{name}: {keys:.0f} of {(length + 1) / 2:.0f} causal keys on average")
        axes.set(xlabel="key", ylabel="query")
    figure.savefig(path, dpi=100)
    return path
