"""Pictures of what attentions see, and of how far they carry information through layers.

python -m evaluation.gallery                                 # all families, and every model
python -m evaluation.gallery --models bigbird --length 4096
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from evaluation.layers import kinds_of_layers, visible_for
from evaluation.raster import first_cells, first_reached, kinds_of_heads, visible_cells
from evaluation.sheet import (
    Panel,
    draw_sheet,
    key_of_depths,
    key_of_kinds,
    shade_depths,
    shade_kinds,
)
from kernels.patterns import Pattern, parse
from models.attention import Chosen
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
    "Longformer, global tokens anywhere": "window(16, 16) | global_at(5, 90, 91, 200)",
    "Neighbourhood, 16 x 16 pixels": "causal() & near2d(16, 16, 2)",
    "Neighbourhood, 16 x 16, bidirectional": "near2d(16, 16, 2)",
    "Sliding tiles, 16 x 16 pixels": "tiles2d(16, 16, 4, 1)",
    "Neighbourhood in a video of 4 frames": "near3d(4, 8, 8, 1)",
    "Block diffusion": "block_diffusion(16, 128)",
}
FAMILY_TOKENS, FAMILY_HEADS, FAMILY_LAYERS = 256, 4, 4
PICTURES = [name for name in FAMILIES if "16 x 16" in name]  # show what a pixel reaches as well
SIDE, MIDDLE = 16, 8 * 16 + 8


def draw_layers(model: Transformer, length: int, path: Path, tokens: Tensor | None = None) -> Path:
    """Draw what the first head of each kind of layer sees of the first 1,024 tokens; returns path.

    Args:
        model: has `attentions` and `hidden_states`, see `models.transformer.Transformer`.
        length: tokens of the sequence; bidirectional random blocks depend on it.
        path: where the PNG file goes; its folder must exist.
        tokens: a text ``(1, L)``, of which layers that choose keys by content read up to 1,024
            tokens; None: random tokens.
    """
    shown = min(length, TOKENS)
    layers = _chosen(model, shown, tokens)
    panels = []
    for kind in kinds_of_layers(model, length):
        visible = layers.get(kind.layers[0], kind.visible)
        colours = shade_kinds(first_cells(visible, shown, length)[None])
        caption = cost(kind.visible, length, 1, kind.attention.is_causal)
        panels.append(Panel(colours, caption, kind.label, repr(kind.visible)))
    draw_sheet(panels, path, columns=4)
    return path


def draw_families(path: Path) -> None:
    """Draw all families side by side: what the heads of a layer see, what four layers reach."""
    length, heads = FAMILY_TOKENS, FAMILY_HEADS
    panels = []
    for name, text in FAMILIES.items():
        layers = [parse(text).on_layer(n) for n in range(FAMILY_LAYERS)]
        colours = shade_kinds(kinds_of_heads(visible_cells(layers[0], length, heads)))
        caption = cost(layers[0], length, heads, layers[0].is_causal)
        panels.append(Panel(colours, caption, name, text, width=2))
        first = depths(layers, length, heads)
        caption = reach(first, layers[0].is_causal)
        if name in PICTURES:
            first, caption = first[MIDDLE].view(SIDE, SIDE), "what a pixel sees, and four layers"
        panels.append(Panel(shade_depths(first), caption))
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
    draw_sheet_of(build(name), name, length, path)


def draw_sheet_of(model: Transformer, name: str, length: int, path: Path) -> None:
    """Draw a model that is called ``name``; see `draw_model`."""
    layers = [attention.visible(length) for _, attention in model.attentions()]
    layers = dict(enumerate(layers)) | _chosen(model, length)
    panels, most = [], 1
    for kind in kinds_of_layers(model, length):
        heads = kinds_of_heads(visible_cells(layers[kind.layers[0]], length, model.heads))
        caption = cost(kind.visible, length, model.heads, kind.attention.is_causal)
        text = f"{ranges(kind.layers)}\n{kind.visible!r}"
        panels.append(Panel(shade_kinds(heads), caption, kind.name, text))
        most = max(most, len(heads))
    first = depths(layers.values(), length, model.heads)
    caption = reach(first, all(attention.is_causal for _, attention in model.attentions()))
    panels.append(Panel(shade_depths(first), caption, "all layers"))
    keys = [key_of_kinds(most), key_of_depths(int(first.max()))]
    draw_sheet(panels, path, columns=4, keys=keys, title=f"{name}, {length:,} tokens")


def _chosen(model: Transformer, length: int, tokens: Tensor | None = None) -> dict[int, Chosen]:
    """What the layers show that choose keys by content, by their number, from 0.

    They choose for ``tokens (1, L)``, or for random ones.
    """
    if not _chooses(model, length):
        return {}
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.vocab_size, (1, length), generator=generator)
    layers = visible_for(model, tokens[:, :length].to(model.embedding.weight.device))
    return {n: shown for n, shown in enumerate(layers) if isinstance(shown, Chosen)}


def _chooses(model: Transformer, length: int) -> bool:
    """Whether any layer chooses keys by content."""
    shown = (attention.visible(length) for _, attention in model.attentions())
    return any(isinstance(visible, Chosen) for visible in shown)


def build(name: str) -> Transformer:
    """The model that ``python train.py model=NAME`` trains.

    It has no memory for weights, unless a layer chooses keys by content.
    """
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("train", overrides=[f"model={name}"])
    with torch.device("meta"):
        model = instantiate(config.model)
    if _chooses(model, LONGEST):
        model.to_empty(device="cpu").initialise()
    return model.eval()


def depths(layers: Iterable[Pattern | Chosen], length: int, heads: int) -> Tensor:
    """After how many of the layers each query depends on each key, ``(L, L)``; 0 for never."""
    return first_reached(visible_cells(shown, length, heads).any(dim=0) for shown in layers)


def cost(visible: Pattern | Chosen, length: int, heads: int, is_causal: bool) -> str:
    """How many keys a query sees, and what share of those that dense attention sees."""
    keys = visible.keys_per_query(length, heads)
    dense = (length + 1) / 2 if is_causal else length
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
