"""Initial weights: each module's own, and those of papers, which are drawn over them.

With their own, output maps are zero, so that every block is the identity.
"""

import math

from torch import nn

from models.attention.longformer import LongformerAttention


def reset_modules(module: nn.Module, done: set[nn.Module] | None = None) -> None:
    """Let all modules below ``module`` draw their own weights: each once, children first."""
    done = set() if done is None else done
    for child in module.children():
        if child not in done:
            done.add(child)
            reset_modules(child, done)
            if hasattr(child, "reset_parameters"):
                child.reset_parameters()


def sparse_transformer(model: nn.Module) -> None:
    """Weights of variance ``0.125 / inputs``; output maps of blocks ``1 / sqrt(2 N)`` of that.

    ``N`` is the number of blocks, each of which adds to the residual stream twice. Embeddings are
    drawn with a standard deviation of ``0.125 / sqrt(dim)``, positions with that over
    ``sqrt(n_emb)``. The logits start at zero.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, sections 5.2, 5.3 and 6. What the
        text calls ``N(0, 0.125 / sqrt(d_in))`` is ``sqrt(0.125 / d_in)`` in the released code.
    """
    for name, linear in _linears(model):
        scale = (2 * len(model.blocks)) ** -0.5 if name.endswith(".out") else 1.0
        nn.init.normal_(linear.weight, std=scale * math.sqrt(0.125 / linear.in_features))
    _copy_projections(model)
    model.embedding.draw(0.125 / math.sqrt(model.dim))


def scaled_normal(model: nn.Module, *, std: float = 0.02) -> None:
    """Weights and embeddings from ``N(0, std^2)``; output maps of blocks ``1 / sqrt(2 N)`` of that.

    The logits start at zero, unless the head is tied to the embedding.

    Source:
        GPT-2, Radford et al. 2019, section 2.3, with the embeddings of BERT, Devlin et al. 2018.
    """
    for name, linear in _linears(model):
        scale = (2 * len(model.blocks)) ** -0.5 if name.endswith(".out") else 1.0
        nn.init.normal_(linear.weight, std=scale * std)
    _copy_projections(model)
    model.embedding.draw(std)


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The maps of the blocks, whose biases are zero already."""
    return [(n, m) for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)]


def _copy_projections(model: nn.Module) -> None:
    """Maps that start as copies of others are copied again."""
    for module in model.modules():
        if isinstance(module, LongformerAttention):
            module.reset_parameters()
