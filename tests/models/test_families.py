"""The families of the papers: their sizes, initial weights, patterns by layer and head, options."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

import kernels.attend
import kernels.elementwise.qkv
import kernels.elementwise.swiglu
from evaluation.layers import kinds_of_layers
from kernels.patterns import causal, fixed, per_head, strided, summary, window
from models.attention import Context
from models.attention.bigbird import BigBirdAttention
from models.attention.longformer import LongformerAttention
from models.attention.pattern import PatternAttention
from models.attention.projections import Projections
from models.attention.sparse_transformer import SparseTransformerAttention
from models.embeddings import Embedding
from models.feed_forward import MLP
from models.initialisation import scaled_normal, sparse_transformer
from models.stack import STACKS, Block, make_stack
from models.transformer import Transformer
from tests.support.configs import composed
from training.optim.optimizers import adamw

sparse = partial(SparseTransformerAttention, 32, 4, stride=16)
longformer = partial(LongformerAttention, 32, 4)
CONTEXT = Context()
FIVE_HEADS = "causal() & (window(2) | per_head(full(), full(), full(), full(), strided(2)))"


def transformer(attention, **options) -> Transformer:
    sizes = {"dim": 32, "layers": 3, "heads": 4} | options
    embedding = partial(Embedding, vocab_size=16, **sizes.pop("embedding", {}))
    block = partial(Block, **sizes.pop("block", {}))
    return Transformer(
        attention={"a": attention}, layout=["a"], embedding=embedding, block=block, **sizes
    )


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():  # zero-initialised maps would hide what they pass
        nn.init.normal_(parameter, std=0.3)
    return module


def sees(module: nn.Module, i: int, j: int, length: int = 48) -> bool:
    """Whether the output at ``i`` depends on the input at ``j``."""
    x = torch.randn(1, length, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x, CONTEXT)[0, i].square().sum(), x)
    return bool(gradient[0, j].any())


# Sparse Transformer


@pytest.mark.parametrize(
    ("experiment", "millions"),
    [
        ("sparse_transformer_enwik8", 94.9),
        ("sparse_transformer_cifar10", 59.2),
        ("longformer_enwik8_small", 38.1),
    ],
)
def test_models_have_the_published_size(experiment, millions):
    with torch.device("meta"):
        model = instantiate(composed(f"experiment={experiment}", "run_id=x").model)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_the_three_uses_of_the_two_parts():
    local, columns = causal() & window(16), causal() & strided(16)
    merged = causal() & (window(16) | strided(16))
    assert sparse(0, kind="strided").pattern == merged
    layers = [sparse(n, kind="strided", use="layers").pattern for n in range(3)]
    assert layers == [local, columns, local]
    heads = sparse(0, kind="strided", use="heads").pattern
    assert heads == causal() & per_head(window(16), strided(16))


def test_heads_of_the_fixed_kind_have_summary_cells_of_their_own():
    own = [fixed(16, 8), fixed(16, 8, sub_block=1)]
    assert sparse(0, kind="fixed", cells=8).pattern == causal() & per_head(*own)
    shared = sparse(0, kind="fixed", cells=8, distinct_sub_blocks=False).pattern
    assert shared == causal() & fixed(16, 8)
    assert sparse(0, kind="fixed", cells=8, sub_blocks=1).pattern == shared
    four = sparse(0, kind="fixed", cells=4).pattern
    assert four == causal() & per_head(*(fixed(16, 4, sub_block=n) for n in range(4)))
    two = sparse(0, kind="fixed", cells=4, sub_blocks=2).pattern
    assert two == causal() & per_head(fixed(16, 4), fixed(16, 4, sub_block=1))
    for wrong in ({"sub_blocks": 5}, {"sub_blocks": 0}, {"distinct_sub_blocks": False}):
        with pytest.raises(ValueError, match="sub_blocks must be from 1 to"):
            sparse(0, kind="fixed", cells=4, **{"sub_blocks": 2} | wrong)
    parts = sparse(1, kind="fixed", cells=8, use="layers").pattern
    assert parts == causal() & per_head(summary(16, 8), summary(16, 8, sub_block=1))
    block = window(1, block=16)
    by_head = sparse(0, kind="fixed", cells=8, use="heads").pattern
    assert by_head == causal() & per_head(block, summary(16, 8), block, summary(16, 8, sub_block=1))


def test_initial_weights_are_those_of_the_paper():
    layers, dim = 8, 256
    model = transformer(
        partial(
            SparseTransformerAttention,
            kind="fixed",
            stride=16,
            cells=8,
            projections=partial(Projections, bias=True, qk_norm=False),
        ),
        dim=dim,
        layers=layers,
        block={"feed_forward": partial(MLP, activation="quick_gelu")},
        embedding={"matrix_shape": [64, 64]},
        rotary_base=None,
        initialise=sparse_transformer,
    )
    block = model.blocks[3]
    expected = {
        block.attention.projections.qkv: math.sqrt(0.125 / dim),
        block.attention.projections.out: math.sqrt(0.125 / dim) / math.sqrt(2 * layers),
        block.feed_forward.up: math.sqrt(0.125 / dim),
        block.feed_forward.out: math.sqrt(0.125 / (4 * dim)) / math.sqrt(2 * layers),
        model.embedding.positions[0].coordinates[0]: 0.125 / math.sqrt(dim) / math.sqrt(2),
    }
    for module, std in expected.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.05)
    assert not model.head.weight.any()
    assert not any(
        p.any()
        for name, p in model.named_parameters()
        if name.endswith("bias") and "norm" not in name
    )


def test_output_maps_of_scaled_normal_weights_shrink_with_depth():
    model = transformer(BigBirdAttention, dim=256, layers=2, initialise=partial(scaled_normal))
    projections = model.blocks[0].attention.projections
    assert projections.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert projections.out.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("initialise", [scaled_normal, sparse_transformer])
def test_initial_weights_leave_copies_of_maps_and_vectors_as_large_as_tokens(initialise):
    attention = partial(LongformerAttention, causal=False, window=4, global_tokens=64)
    vectors = {"global_vectors": 64}
    model = transformer(attention, dim=64, embedding=vectors, initialise=initialise)
    for block in model.blocks:
        own, common = block.attention.global_projections, block.attention.projections
        assert torch.equal(own.qkv.weight, common.qkv.weight)
    vectors, tokens = model.embedding.global_vectors.weight, model.embedding.weight
    assert vectors.std().item() == pytest.approx(tokens.std().item(), rel=0.1)


def test_adamw_decays_the_maps_and_the_head_of_a_model_alone():
    attention = partial(LongformerAttention, causal=False, window=4, global_tokens=2)
    learned = {"global_vectors": 2, "matrix_shape": [8, 8]}
    model = transformer(attention, layers=1, embedding=learned, block={"norm": "layer"})
    decayed, kept = adamw(model, lr=0.1, betas=(0.9, 0.99), weight_decay=1, eps=1e-8).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "blocks.0.attention.projections.qkv.weight",
        "blocks.0.attention.projections.out.weight",
        "blocks.0.attention.global_projections.qkv.weight",
        "blocks.0.feed_forward.gate_and_up.weight",
        "blocks.0.feed_forward.out.weight",
        "head.weight",
    }
    assert kept["weight_decay"] == 0


def test_quick_gelu_is_a_sigmoid_of_1_702_x():
    layer = randomised(MLP(4, None, activation="quick_gelu"))
    x = torch.randn(3, 4)
    hidden = layer.up(x)
    torch.testing.assert_close(layer(x), layer.out(hidden * torch.sigmoid(1.702 * hidden)))
    assert hidden.shape == (3, 16)


def test_dropout_leaves_attention_probabilities_alone():
    torch.manual_seed(0)
    model = transformer(BigBirdAttention, block={"dropout": 0.5})
    attention = randomised(model.blocks[0].attention).train()
    x = torch.randn(1, 20, 32)
    assert torch.equal(attention(x, CONTEXT), attention(x, CONTEXT))


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_recomputing_changes_no_gradient_even_with_dropout(
    implementation, monkeypatch, kernel_device
):
    for module in (kernels.attend, kernels.elementwise.qkv, kernels.elementwise.swiglu):
        monkeypatch.setattr(module, "choose", lambda *_: implementation)
    models = [
        transformer(BigBirdAttention, block={"dropout": 0.3}, stack=stack).to(kernel_device)
        for stack in STACKS
    ]
    models[1].load_state_dict(randomised(models[0]).state_dict())
    tokens, results = torch.randint(16, (2, 65), device=kernel_device), []
    for model in models:
        torch.manual_seed(7)
        nats, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        nats.backward()
        results.append([nats, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


class Mixing(nn.Module):
    """Stands in for attention."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(32, 32)

    def forward(self, x, context):
        return self.map(x).cumsum(dim=1)

    def route(self, x, context):
        return None


def test_a_compiled_block_that_recomputes_is_one_graph_and_keeps_its_input_alone():
    x, kept, gradients = torch.randn(4, 64, 32), [], []
    for stack in STACKS:
        torch.manual_seed(0)
        (block,) = make_stack(stack, [randomised(Block(Mixing(), 32))])
        own = {p.data_ptr() for p in block.parameters()} | {x.data_ptr()}
        saved = []
        block.compile(fullgraph=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t) or t, lambda t: t
        ):
            out = block(x, CONTEXT)
        kept.append(sum(t.numel() for t in saved if t.data_ptr() not in own))
        out.square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    assert kept[0] > 4 * x.numel()
    assert kept[1] == 0
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


# Longformer


def test_windows_and_gaps_by_layer_and_head():
    layers = [
        longformer(n, window=[4, 8], dilation=[1, 3], dilated_heads=1).pattern for n in range(2)
    ]
    assert layers[0] == causal() & window(4)
    for head in range(4):
        seen = layers[1].dense(48, head)[40].nonzero().flatten().tolist()
        assert seen == (list(range(19, 41, 3)) if head == 3 else list(range(33, 41)))


def test_half_of_an_encoders_window_is_on_each_side():
    pattern = longformer(0, causal=False, window=8).pattern
    assert pattern.dense(20)[10].nonzero().flatten().tolist() == list(range(6, 15))


def test_global_tokens_see_everything_through_maps_of_their_own_and_others_see_them():
    attention = randomised(longformer(0, causal=False, window=4, global_tokens=2))
    assert sees(attention, 0, 40)
    assert sees(attention, 1, 47)
    assert sees(attention, 40, 1)
    assert not sees(attention, 40, 20)
    x = torch.randn(1, 48, 32)
    with torch.no_grad():
        before = attention(x, CONTEXT)
        attention.global_projections.qkv.weight.mul_(0.5)
        after = attention(x, CONTEXT)
    changed = (before != after).any(dim=-1)[0]
    assert changed[:2].all()
    assert not changed[2:].any()


def test_maps_of_global_tokens_start_as_copies():
    own = longformer(0, causal=False, window=4, global_tokens=2)
    common = longformer(0, causal=False, window=4, global_tokens=2, global_projections=False)
    weights = randomised(common).projections
    own.projections.load_state_dict(weights.state_dict())
    own.global_projections.load_state_dict(
        {k: v for k, v in weights.state_dict().items() if not k.startswith("out")}
    )
    x = torch.randn(2, 48, 32)
    torch.testing.assert_close(own(x, CONTEXT), common(x, CONTEXT))
    fresh = longformer(0, causal=False, global_tokens=1)
    assert torch.equal(fresh.projections.qkv.weight, fresh.global_projections.qkv.weight)


def test_global_tokens_keep_to_their_document():
    attention = randomised(longformer(0, causal=False, window=4, global_tokens=2))
    documents = torch.tensor([[0] * 30 + [1] * 18], dtype=torch.int32)
    x = torch.randn(1, 48, 32)
    first = attention(x, Context(documents=documents))
    x[:, 30:] = 9.0
    second = attention(x, Context(documents=documents))
    assert torch.equal(first[:, :30], second[:, :30])


# BigBird


def test_vectors_in_front_carry_what_is_far_and_are_not_scored():
    attention = partial(
        BigBirdAttention,
        causal=False,
        block=4,
        global_blocks=0,
        random_blocks=0,
        global_tokens=2,
    )
    with_vectors = randomised(transformer(attention, embedding={"global_vectors": 2}))
    alone = randomised(transformer(partial(attention, global_tokens=0), layers=2))
    tokens = torch.randint(16, (1, 64))
    assert with_vectors(tokens).shape == (1, 64, 16)
    changed = tokens.clone()
    changed[0, 60] = (tokens[0, 60] + 1) % 16
    with torch.no_grad():
        assert not torch.equal(with_vectors(tokens)[0, 0], with_vectors(changed)[0, 0])
        assert torch.equal(alone(tokens)[0, 0], alone(changed)[0, 0])  # two windows away at most
    nats, count = with_vectors.loss(tokens, tokens)
    assert count == 64
    nats.backward()
    assert with_vectors.embedding.global_vectors.weight.grad.any()


# What cannot be


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparse(0, kind="random"), "got random and merged"),
        (lambda: sparse(0, kind="fixed", use="both"), "got fixed and both"),
        (lambda: longformer(2, window=[4, 8]), r"got 2 for layer 3: \[4, 8\]"),
        (
            lambda: transformer(partial(LongformerAttention, window=[4, 8, 8, 8])),
            "model.attention.a: window .* each of the 3 layers, got 4",
        ),
        (
            lambda: transformer(partial(LongformerAttention, dilation=[1, 2, 2, 2])),
            "model.attention.a: dilation .* each of the 3 layers, got 4",
        ),
        (
            lambda: transformer(partial(PatternAttention, pattern=FIVE_HEADS)),
            "model.attention.a: per_head .* heads=4, got 5: causal",
        ),
        (lambda: longformer(0, dilated_heads=5), "got 5 and 0"),
        (lambda: longformer(0, window=1, causal=False), "at least 2, got 1"),
        (lambda: sparse(0, kind="fixed", cells=0), "cells must be at least 1, got 0"),
        (lambda: BigBirdAttention(32, 4, 0, causal=False, window_blocks=2), "odd, got 2"),
        (lambda: BigBirdAttention(32, 4, 0, global_tokens=-2), "got 2, -2 and 3"),
        (lambda: Projections(32, 4, qk_dim=10), "heads=4, got 10"),
        (lambda: Projections(32, 4, qk_dim=12), "heads=4, got 12"),  # heads of 3
        (lambda: MLP(4, None, activation="relu"), "got relu"),
        (lambda: transformer(BigBirdAttention, block={"norm": "batch"}), "got batch"),
        (
            lambda: transformer(BigBirdAttention, embedding={"global_vectors": 4}),
            "see later tokens",
        ),
        (lambda: transformer(BigBirdAttention, stack="reverse"), "plain, recompute, got reverse"),
        (
            lambda: transformer(
                partial(BigBirdAttention, projections=partial(Projections, qk_dim=16))
            ),
            "model.rotary_base=null",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_queries_and_keys_may_be_narrower_than_values():
    attention = randomised(
        BigBirdAttention(32, 4, 0, block=16, projections=partial(Projections, qk_dim=8))
    )
    x = torch.randn(1, 40, 32)
    q, k, v = attention.projections.split(x, CONTEXT)
    assert q.shape == k.shape == (1, 4, 40, 2)
    assert v.shape == (1, 4, 40, 8)
    mask = torch.stack([attention.pattern.dense(40, head) for head in range(4)])
    expected = attention.projections.join(F.scaled_dot_product_attention(q, k, v, mask))
    torch.testing.assert_close(attention(x, CONTEXT), expected)


def test_different_patterns_of_one_attention_are_all_named():
    model = transformer(partial(SparseTransformerAttention, kind="strided", stride=8, use="layers"))
    assert [kind.label for kind in kinds_of_layers(model, 64)] == ["a", "a, layer 2"]
    (kind,) = kinds_of_layers(transformer(BigBirdAttention), 64)
    assert (kind.label, kind.layers) == ("a", [0, 1, 2])
