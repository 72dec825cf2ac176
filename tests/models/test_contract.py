"""An attention that chooses keys by content needs no more than the contract of an attention."""

import pytest
import torch
from hydra.utils import instantiate
from matplotlib.image import imread

import evaluation.gallery as gallery
from evaluation.generation import generate
from evaluation.layers import kinds_of_layers, visible_for
from evaluation.raster import visible_cells
from models.attention import Attention
from models.attention.pattern import PatternAttention
from models.cache import LayerCache
from tests.models.test_cache import predicted
from tests.models.topk import TopKAttention
from tests.support.commands import curve, train
from tests.support.configs import SMALL, composed

TOPK = [
    "+model.attention.topk={_target_: tests.models.topk.TopKAttention, _partial_: true, keys: 6}",
    "model.layout=[topk]",
]
MIXED = [  # a ring of a window, all keys, and what top-k keeps
    TOPK[0],
    "model=hybrid",
    "model.attention.window.pattern='causal() & window(12)'",
    "model.layout=[window,dense,topk]",
    "model.layers=3",
]


def build(*overrides, seed=0):
    """A model whose maps all pass something on."""
    torch.manual_seed(seed)
    model = instantiate(composed("model=dense", *SMALL, *overrides).model)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens(length=75, rows=2):
    return torch.randint(256, (rows, length))


def test_it_trains_through_the_script_and_is_drawn_and_counted(tmp_path):
    folder = tmp_path / "run"
    train(folder, "model=dense", *TOPK, "trainer.max_steps=20", "callbacks.samples.tokens=8")
    losses = [step["train/loss_nats"] for step in list(curve(folder).values())[1:]]
    assert losses[-1] < losses[0] - 0.5
    log = (folder / "train.log").read_text()
    # (1 + 2 + 3 + 4 + 5 + 59 * 6) / 64 = 5.77
    assert "topk: a token sees 6 of 32 causal keys (17.7 %): the 6 best keys of the past" in log
    assert imread(folder / "samples" / "attention.png").std() > 0
    assert (folder / "samples" / "step-20.txt").exists()
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = build(*TOPK)
    model.load_state_dict({name.removeprefix("model."): w for name, w in saved.items()})


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 23])
@pytest.mark.parametrize("overrides", [TOPK, MIXED], ids=["topk", "mixed"])
def test_it_generates_token_by_token_what_the_whole_text_gives(overrides, first):
    model, text = build(*overrides).eval(), tokens()
    found = torch.stack(list(predicted(model, text, first)), dim=1)
    torch.testing.assert_close(found, model(text)[:, first - 1 :], rtol=1e-5, atol=1e-5)
    cache = model.cache(75)
    assert len({type(layer) for layer in cache.layers}) == (2 if overrides is MIXED else 1)
    written = generate(model, text[:, :5], 30, temperature=0)
    whole = torch.cat((torch.full_like(written[:, :1], 256), written), dim=1)
    assert torch.equal(written[:, 5:], model(whole)[:, 5:-1].argmax(dim=-1))


@torch.no_grad()
def test_it_is_causal_bitwise_and_keeps_to_documents():
    model, before = build(*TOPK), tokens()
    assert all(attention.is_causal for _, attention in model.attentions())
    after = before.clone()
    after[:, 40:] = (before[:, 40:] + 1) % 256
    logits, changed = model(before), model(after)
    assert torch.equal(logits[:, :40], changed[:, :40])
    assert not torch.equal(logits[:, 40:], changed[:, 40:])
    documents = (torch.arange(75) >= 40).int().expand(2, -1)
    after = before.clone()
    after[:, :40] = (before[:, :40] + 1) % 256
    assert torch.equal(model(before, documents)[:, 40:], model(after, documents)[:, 40:])


def test_its_cells_are_those_that_it_reads():
    model, text = build(*TOPK), tokens(48, rows=1)
    first = visible_for(model, text)[0]
    (cells,) = visible_cells(first, 48, model.heads)[:1]
    assert cells.sum(dim=1).tolist() == [min(n, 6) for n in range(1, 49)]
    assert not cells.triu(1).any()
    assert first.keys_per_query(48) == pytest.approx(cells.sum().item() / 48)
    x = model.embedding(text).detach().requires_grad_()
    attention, norm = model.blocks[0].attention, model.blocks[0].attention_norm
    context = model._context(x, 0, None)
    seen = attention.visible(48, norm(x), context).cells.any(dim=0)[40]
    (gradient,) = torch.autograd.grad(attention(norm(x), context)[0, 40].square().sum(), x)
    assert torch.equal(gradient[0].any(dim=1), seen | (torch.arange(48) == 40))


def test_it_has_a_sheet_in_the_gallery(tmp_path):
    gallery.draw_sheet_of(build(*MIXED), "mixed", 128, tmp_path / "sheet.png")
    assert imread(tmp_path / "sheet.png").std() > 0
    kinds = kinds_of_layers(build(*TOPK), 64)
    assert [(kind.label, kind.layers) for kind in kinds] == [("topk", [0, 1])]


def test_its_operations_are_counted():
    length, dim, layers = 64, 32, 2
    keys, scored = (15 + 59 * 6) / 64, 32.5
    dense, topk = build(), build(*TOPK)
    saved = 3 * layers * (4 * dim * scored - 2 * dim * scored - 4 * dim * keys)
    assert dense.flops_per_token(length) - topk.flops_per_token(length) == pytest.approx(saved)


def gradients(model, text):
    nats, _ = model.loss(text[:, :-1], text[:, 1:])
    nats.backward()
    return [nats.detach(), *(p.grad for p in model.parameters())]


def test_recomputation_decides_once_and_gives_the_same_gradients():
    text, found = tokens(), []
    for stack in ("plain", "recompute"):
        model = build(*TOPK, f"model.stack={stack}")
        found.append(gradients(model, text))
        assert [attention.decisions for _, attention in model.attentions()] == [1, 1]
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_routing_that_is_given_back_is_used():
    model, x = build(*TOPK), torch.randn(1, 40, 32)
    attention = model.blocks[0].attention
    context = model._context(x, 0, None)
    routing = attention.route(x, context)
    given = type(context)(rotary=context.rotary, routing=routing)
    assert torch.equal(attention(x, given), attention(x, context))
    other = type(context)(rotary=context.rotary, routing=routing.roll(1, dims=1))
    assert not torch.equal(attention(x, other), attention(x, context))
    assert attention.decisions == 3  # two by itself, one when asked


@pytest.mark.parametrize("stack", ["plain", "recompute"])
def test_a_compiled_block_is_one_graph_each_way_and_chooses_once(stack):
    text, graphs = tokens(), []

    def backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, inputs):
            graphs.append(graph)
            return graph.forward

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    eager, compiled = (build(*TOPK, f"model.stack={stack}") for _ in range(2))
    torch._dynamo.reset()
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend=backend)
    for ours, theirs in zip(gradients(eager, text), gradients(compiled, text), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(graphs) % 2 == 0
    choices = ["topk" in graph.code for graph in graphs]
    assert sum(choices) == len(graphs) // 2  # the backward passes have none


# ----------------------------------------------------------------- what cannot go wrong silently


def test_a_subclass_of_pattern_attention_cannot_decode_as_its_pattern():
    for name in ("attend", "forward", "route"):
        with pytest.raises(TypeError, match=f"`{name}` of its own .* cache, flops_per_token"):
            type("TopK", (PatternAttention,), {name: lambda self, *_: None})

    class Mixin:
        def attend(self, q, k, v, context):
            return v

    with pytest.raises(TypeError, match="derive from Attention"):
        type("Mixed", (Mixin, PatternAttention), {})


def test_an_attention_that_does_not_fill_its_cache_is_refused():
    class Forgetful(TopKAttention):
        def forward(self, x, context):
            return self.projections.join(self.projections.split(x, context)[2])

    model = build(*TOPK)
    model.blocks[1].attention = Forgetful(32, 2, 1, keys=3)
    with pytest.raises(RuntimeError, match="layer 2 did not fill its TopKCache with the 6 tokens"):
        generate(model, tokens(5), 3)


def test_an_attention_must_keep_the_whole_contract():
    with pytest.raises(TypeError, match="abstract method"):
        type("Partial", (Attention,), {"forward": lambda self, x, context: x})()
    with pytest.raises(TypeError, match="abstract method"):
        type("Partial", (LayerCache,), {"fill": lambda self: None})()
