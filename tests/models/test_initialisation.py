"""Weights are drawn after construction: a model may first be made without memory, and sharded."""

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from models.transformer import Transformer
from tests.support.configs import CONF, MODELS, SMALL, composed

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TIED = ["model=dense", "model.head.tied=true", "model.embedding.matrix_shape=[8,8]"]
ALL = [
    *([f"model={name}"] for name in MODELS),
    *([f"experiment={name}", "run_id=x"] for name in EXPERIMENTS),
    TIED,
]


def small(*overrides: str) -> dict:
    """The configuration of a model with few and narrow layers."""
    config = composed(*SMALL, *overrides).model
    for attention in config.attention.values():
        for name in ("window", "dilation"):  # one number a layer
            if name in attention and not isinstance(attention[name], int):
                attention[name] = attention[name][:2]
        if "projections" in attention and attention.projections.get("qk_dim"):
            attention.projections.qk_dim = 8
    return config


@pytest.mark.parametrize("overrides", ALL, ids=" ".join)
def test_a_model_made_without_memory_gets_the_weights_of_one_made_directly(overrides):
    config = small(*overrides)
    torch.manual_seed(3)
    direct = instantiate(config)
    after = torch.rand(1)
    with torch.device("meta"):
        later = instantiate(config)
    assert all(tensor.is_meta for tensor in [*later.parameters(), *later.buffers()])
    later.to_empty(device="cpu")
    for tensor in [*later.parameters(), *later.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)  # nothing is left out
    torch.manual_seed(3)
    later.initialise()
    assert torch.equal(torch.rand(1), after)  # as many numbers were drawn
    wanted = direct.state_dict()
    assert later.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in later.state_dict().items())
    assert all(p.requires_grad and p.is_leaf for p in later.parameters())


def test_a_model_may_be_drawn_again():
    torch.manual_seed(3)
    model = instantiate(small("model=bigbird"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    model.initialise()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == places[name]  # in place: shards stay shards


def test_a_tied_head_stays_tied_when_memory_comes_later():
    with torch.device("meta"):
        model = instantiate(small(*TIED))
    model.to_empty(device="cpu").initialise()
    assert model.head.embedding is model.embedding
    nn.init.normal_(model.embedding.weight)
    x = torch.randn(1, 3, 32)
    logits = model.head.norm(x) @ model.embedding.weight[:256].mT
    torch.testing.assert_close(model.head(x), logits)


class Marked(nn.Module):
    """A feed-forward layer with a buffer, which is made again with the weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mark", torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.mark.copy_(torch.arange(len(self.mark)))

    def forward(self, x):
        return x * self.mark


def test_buffers_are_made_again():
    config = small("model=dense")
    make = partial(
        Transformer, **{k: v for k, v in instantiate(config, _partial_=True).keywords.items()}
    )
    block = partial(instantiate(config.block), feed_forward=Marked)
    with torch.device("meta"):
        model = make(block=block)
    model.to_empty(device="cpu").initialise()
    assert model.blocks[1].feed_forward.mark.tolist() == list(range(32))
