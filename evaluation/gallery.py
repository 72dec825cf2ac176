"""Pictures of attention patterns, and of how far they carry information through layers.

python -m evaluation.gallery                                 # all families, and every model
python -m evaluation.gallery --models bigbird --length 4096
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from evaluation.raster import first_reached, kinds_of_heads, visible_cells
from evaluation.sheet import (
    Panel,
    draw_sheet,
    key_of_depths,
    key_of_kinds,
    shade_depths,
    shade_kinds,
)
from kernels.patterns import Pattern, parse
from models.transformer import Transformer

CONF = Path(__file__).parents[1] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "base")
TOKENS = 1024  # the leading tokens that a picture of a run shows
LONGEST = 4096  # tokens of a sheet: memory grows with their square

# What the papers describe, at sizes that a small picture can show.
FAMILIES = {
    "Dense": "causal()",
    "Sliding window": "causal() & window(32)",
    "Sparse Transformer, strided": "causal() & (window(16) | strided(16))",
    "Sparse Transformer, fixed": (
        "causal() & per_head(fixed(32, 4), fixed(32, 4, sub_block=1), fixed(32, 4, sub_block=2))"
    ),
    "Longformer, dilated heads": (
        "causal() & per_head(window(24), window(24), dilated(16, 4), dilated(16, 8))"
    ),
    "BigBird": "causal() & (window(3, block=8) | global_tokens(16) | random_blocks(2, block=8))",
    "Longformer, bidirectional": "window(16, 16) | global_tokens(8)",
    "BigBird, bidirectional": (
        "window(1, 1, block=8) | global_tokens(16) | random_blocks(2, block=8)"
    ),
}
FAMILY_TOKENS, FAMILY_HEADS, FAMILY_LAYERS = 256, 4, 4


def draw_patterns(patterns: dict[str, Pattern], length: int, path: Path) -> Path:
    """Draw what the first head sees of the first 1,024 tokens, to a PNG file; returns its path.

    Args:
        patterns: name -> pattern, one panel each.
        length: tokens of the sequence; bidirectional random blocks depend on it.
        path: where the file goes; its folder must exist.
    """
    token = torch.arange(min(length, TOKENS))
    panels = []
    for name, pattern in patterns.items():
        cells = pattern.visible(token[:, None], token[None, :], length=length)
        colours = shade_kinds(cells[None])
        panels.append(Panel(colours, cost(pattern, length, heads=1), name, repr(pattern)))
    draw_sheet(panels, path, columns=4)
    return path


def draw_families(path: Path) -> None:
    """Draw all families side by side: what the heads of a layer see, what four layers reach."""
    length, heads = FAMILY_TOKENS, FAMILY_HEADS
    panels = []
    for name, text in FAMILIES.items():
        layers = [parse(text).on_layer(n) for n in range(FAMILY_LAYERS)]
        colours = shade_kinds(kinds_of_heads(visible_cells(layers[0], length, heads)))
        panels.append(Panel(colours, cost(layers[0], length, heads), name, text, width=2))
        first = depths(layers, length, heads)
        panels.append(Panel(shade_depths(first), reach(first, layers[0].is_causal)))
    scale = f"a row is a query, a column a key; {length} tokens, {heads} heads"
    keys = [key_of_kinds(heads), key_of_depths(FAMILY_LAYERS), [scale]]
    draw_sheet(panels, path, columns=4, keys=keys)


def draw_model(name: str, length: int, path: Path) -> None:
    """Draw what each different layer of a model sees, and what all of its layers reach.

    Args:
        name: a file of conf/model.
        length: tokens of the sequence.
        path: where the file goes; its folder must exist.
    """
    model = build(name)
    layers = [block.attention.pattern for block in model.blocks]
    alike: dict[tuple[str, Pattern], list[int]] = {}
    for n, pattern in enumerate(layers):  # random blocks alone do not make a layer different
        alike.setdefault((model.layout[n], pattern.on_layer(-n)), []).append(n)
    panels, most = [], 1
    for (attention, pattern), numbers in alike.items():
        kinds = kinds_of_heads(visible_cells(layers[numbers[0]], length, model.heads))
        caption = cost(pattern, length, model.heads)
        text = f"{ranges(numbers)}\n{pattern!r}"
        panels.append(Panel(shade_kinds(kinds), caption, attention, text))
        most = max(most, len(kinds))
    first = depths(layers, length, model.heads)
    caption = reach(first, all(pattern.is_causal for pattern in layers))
    panels.append(Panel(shade_depths(first), caption, "all layers"))
    keys = [key_of_kinds(most), key_of_depths(int(first.max()))]
    draw_sheet(panels, path, columns=4, keys=keys, title=f"{name}, {length:,} tokens")


def build(name: str) -> Transformer:
    """The model that ``python train.py model=NAME`` trains, without memory for its weights."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("train", overrides=[f"model={name}"])
    with torch.device("meta"):
        return instantiate(config.model)


def depths(layers: Sequence[Pattern], length: int, heads: int) -> Tensor:
    """After how many of the layers each query depends on each key, ``(L, L)``; 0 for never."""
    return first_reached(visible_cells(p, length, heads).any(dim=0) for p in layers)


def cost(pattern: Pattern, length: int, heads: int) -> str:
    """How many keys a query sees, and what share of those that dense attention sees."""
    keys = pattern.keys_per_query(length, heads)
    dense = (length + 1) / 2 if pattern.is_causal else length
    return f"{keys:,.0f} keys per query, {100 * keys / dense:.3g} % of dense"


def reach(first: Tensor, is_causal: bool) -> str:
    """How many layers it takes to reach what share of the keys."""
    length, layers = len(first), int(first.max())
    share = int(first.count_nonzero()) / (length * (length + 1) / 2 if is_causal else length**2)
    verb = "layer reaches" if layers == 1 else "layers reach"
    return f"{layers} {verb} " + ("all" if share == 1 else f"{100 * share:.3g} %")


def ranges(numbers: Sequence[int]) -> str:
    """Layers 0, 1, 2 and 6 as ``layers 1-3, 7``."""
    firsts = [n for n in numbers if n - 1 not in numbers]
    lasts = [n for n in numbers if n + 1 not in numbers]
    parts = [
        f"{a + 1}" if a == b else f"{a + 1}-{b + 1}" for a, b in zip(firsts, lasts, strict=True)
    ]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def main() -> None:
    summary, examples = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.gallery",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME",
                        help=f"a sheet for each of {', '.join(MODELS)} (default: all)")  # fmt: skip
    parser.add_argument("--length", type=int, default=2048,
                        help="tokens of a sheet (default: 2048)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("outputs/gallery"),
                        help="folder of the pictures (default: outputs/gallery)")  # fmt: skip
    arguments = parser.parse_args()
    if not 1 <= arguments.length <= LONGEST:
        parser.error(f"--length must be from 1 to {LONGEST:,} tokens, got {arguments.length}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        draw_families(arguments.out / "gallery.png")
        for name in arguments.models:
            draw_model(name, arguments.length, arguments.out / f"{name}.png")
    except OSError as error:
        parser.error(
            f"--out must be a folder that can be written, got {arguments.out} ({error.strerror})"
        )
    print(f"drew gallery.png and {len(arguments.models)} models in {arguments.out}")


if __name__ == "__main__":
    main()
