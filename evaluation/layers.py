"""What the layers of a model show, and which of them are alike: random draws make no difference."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.patterns import Pattern
from kernels.patterns.terms.random_blocks import RandomBlocks
from models.attention import Attention, Chosen


@dataclass(frozen=True)
class Kind:
    """Layers that have one attention and show alike.

    Args:
        name: of the attention.
        label: the name, with the first layer's number where the attention has several kinds.
        layers: their numbers, from 0.
        attention: of the first of them.
        visible: what it shows.
    """

    name: str
    label: str
    layers: list[int]
    attention: Attention
    visible: Pattern | Chosen


def kinds_of_layers(model: nn.Module, length: int) -> list[Kind]:
    """The different kinds of layers of sequences of ``length`` tokens, from the first layer up."""
    kinds: dict[tuple[str, Pattern | Chosen], Kind] = {}
    names = set()
    for layer, (name, attention) in enumerate(model.attentions()):
        visible = attention.visible(length)
        key = name, visible.on_layer(-layer)
        if key in kinds:
            kinds[key].layers.append(layer)
            continue
        label = f"{name}, layer {layer + 1}" if name in names else name
        names.add(name)
        kinds[key] = Kind(name, label, [layer], attention, visible)
    return list(kinds.values())


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def visible_for(model: nn.Module, tokens: Tensor) -> list[Pattern | Chosen]:
    """What each layer shows of a text ``(1, L)``, with cells where keys are chosen by content."""
    found: list[Pattern | Chosen] = []
    hooks = [
        attention.register_forward_pre_hook(
            lambda made, given: found.append(made.visible(tokens.shape[1], *given))
        )
        for _, attention in model.attentions()
    ]
    try:
        model.hidden_states(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def share_of_draws_inside(pattern: Pattern, documents: Tensor, heads: int) -> float | None:
    """Share of the blocks drawn for documents ``(B, L)`` that lie inside them and show something.

    Bidirectional random blocks are drawn for the whole row; None if the pattern has none.
    """
    sizes = [n for row in documents for n in row.unique_consecutive(return_counts=True)[1].tolist()]
    inside = drawn = 0
    for term in _bidirectional_draws(pattern.bound()):
        draws = term.draws(heads, documents.shape[1])
        for size in sizes:
            blocks = -(-size // term.block)
            own = draws[:, :blocks]
            inside += int(((own >= 0) & (own < blocks)).sum())
            drawn += int((own >= 0).sum())
    return inside / drawn if drawn else None


def _bidirectional_draws(pattern: Pattern) -> Iterator[RandomBlocks]:
    if isinstance(pattern, RandomBlocks) and not pattern.surroundings.around.is_causal:
        yield pattern
    for operand in pattern.operands:
        yield from _bidirectional_draws(operand)
