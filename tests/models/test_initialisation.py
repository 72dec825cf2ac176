"""Weights are drawn after construction: a model may first be made without memory, and sharded."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.multiprocessing import start_processes

from models.stack import Block
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
    block = partial(Block, feed_forward=Marked)
    with torch.device("meta"):
        model = instantiate(small("model=dense"), block=block)
    model.to_empty(device="cpu").initialise()
    assert model.blocks[1].feed_forward.mark.tolist() == list(range(32))


def shard_then_draw(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    with torch.device("meta"):
        model = instantiate(small("model=bigbird"))
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    model.to_empty(device="cpu")
    model.initialise()
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    tokens = torch.randint(256, (1, 64))
    nats, count = model.loss(tokens, tokens)
    if rank == 0:
        torch.save((whole, (nats / count).item()), f"{folder}/result")
    dist.destroy_process_group()


def test_a_model_may_be_sharded_before_it_has_weights(tmp_path):
    start_processes(shard_then_draw, (str(tmp_path),), nprocs=2, start_method="fork")
    weights, nats = torch.load(tmp_path / "result")
    model = instantiate(small("model=bigbird"))
    assert nats == pytest.approx(math.log(256))  # the head is zero
    for name, parameter in model.named_parameters():
        assert weights[name].shape == parameter.shape
        spread = parameter.std().item()
        assert weights[name].std().item() == pytest.approx(spread, rel=0.15, abs=1e-6), name
    assert not weights["embedding.weight"][256].any()
