"""Every model of conf/model: causality, gradients, exact sums. New yaml files are found."""

import math

import pytest
import torch
from hydra.utils import instantiate

from evaluation.layers import kinds_of_layers
from models.embeddings import Embedding
from models.heads import Head
from tests.support.configs import MODELS, SMALL, composed

LENGTH = 256  # four blocks of BigBird


def build(name: str, *overrides: str):
    return instantiate(composed(f"model={name}", *SMALL, *overrides).model)


@pytest.fixture(params=MODELS)
def model(request, device):
    model = build(request.param).to(device)
    for parameter in model.parameters():  # zero-initialised projections would hide what they pass
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens(device, rows=2, length=LENGTH):
    return torch.randint(256, (rows, length), device=device)


@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_prediction_bitwise(model, device):
    before = tokens(device)
    logits = model(before)
    for position in (1, 100, LENGTH - 1):
        for value in (0, 255, 256):
            after = before.clone()
            after[:, position:] = value
            changed = model(after)
            assert torch.equal(logits[:, :position], changed[:, :position])
            assert not torch.equal(logits[:, position:], changed[:, position:])


def test_every_parameter_gets_a_gradient(model, device):
    nats, count = model.loss(tokens(device), tokens(device))
    (nats / count).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_an_untrained_model_has_exactly_eight_bits_per_byte(device):
    model = build("bigbird").to(device)
    nats, count = model.loss(tokens(device), tokens(device))
    assert nats.item() / count.item() / math.log(2) == pytest.approx(8, abs=1e-6)


def test_padding_is_not_scored(model, device):
    inputs, targets = tokens(device), tokens(device)
    with torch.no_grad():
        nats, count = model.loss(inputs, targets)
        first, first_count = model.loss(inputs, targets.where(targets % 2 == 0, -1))
        second, second_count = model.loss(inputs, targets.where(targets % 2 == 1, -1))
    assert int(count) == targets.numel() == int(first_count + second_count)
    assert nats.item() == pytest.approx((first + second).item(), rel=1e-6)


def test_overfits_one_batch(model, device):
    batch = tokens(device, rows=1, length=65) % 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        nats, count = model.loss(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        (nats / count).backward()
        optimizer.step()
    assert (nats / count).item() < 0.05


def test_half_precision_is_close_to_single(model, device):
    batch = tokens(device)
    with torch.no_grad():
        single = model(batch)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            half = model(batch).float()
    assert (half - single).norm() / single.norm() < 0.03


@pytest.mark.parametrize("compiled", [False, True])
def test_loss_in_chunks_equals_loss_at_once(compiled, monkeypatch, device):
    head = Head(8, Embedding(8, vocab_size=11)).to(device)
    torch.nn.init.normal_(head.weight)
    x = torch.randn(3, 20, 8, device=device, requires_grad=True)
    targets = torch.randint(-1, 11, (3, 20), device=device)
    nats, count = head.loss(x, targets)
    whole = torch.autograd.grad(nats, [x, head.weight])
    monkeypatch.setattr("models.heads.LOGITS_AT_ONCE", 7 * 11)
    if compiled:
        head.compile()
    chunked, chunked_count = head.loss(x, targets)
    parts = torch.autograd.grad(chunked, [x, head.weight])
    torch.testing.assert_close(chunked, nats)
    torch.testing.assert_close(parts, whole)
    assert count == chunked_count


def test_a_tied_head_shares_the_embedding():
    tied, untied = build("dense", "model.head.tied=true"), build("dense")
    assert tied.head.embedding is tied.embedding
    saved = 256 * 32
    size = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert size == saved
    assert tied(torch.tensor([[256, 3]])).shape == (1, 2, 256)  # the start id is no output


def test_layout_repeats_to_the_depth_and_mixes_families():
    dense = "{_target_: models.attention.dense.DenseAttention, _partial_: true}"
    model = build(
        "bigbird",
        "model.layers=5",
        "model.layout=[bigbird, dense]",
        f"+model.attention.dense={dense}",
    )
    assert model.layout == ["bigbird", "dense", "bigbird", "dense", "bigbird"]
    assert [kind.label for kind in kinds_of_layers(model, 64)] == ["bigbird", "dense"]


def test_each_layer_of_bigbird_draws_its_own_blocks():
    first, second = (block.attention.pattern for block in build("bigbird").blocks)
    assert first != second
    assert first.keys_per_query(1024) == pytest.approx(second.keys_per_query(1024), rel=0.02)


def test_operations_count_the_live_keys_only():
    dense, bigbird = build("dense"), build("bigbird")
    length, dim, layers = 2048, 32, 2
    saved = (
        12 * dim * layers * (1024.5 - bigbird.blocks[0].attention.pattern.keys_per_query(length))
    )
    assert dense.flops_per_token(length) - bigbird.flops_per_token(length) == pytest.approx(saved)
    # One matrix product of (1, n) by (n, m) is 2nm forward and 4nm backward.
    matrices = layers * (4 * dim * dim + 3 * dim * 128) + 256 * dim
    assert dense.flops_per_token(length) == 6 * matrices + 12 * dim * layers * 1024.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dim=30", "model.heads=4"], "dim=30 and heads=4"),
        (["model.dim=12", "model.heads=4"], "dim=12 and heads=4"),
        (["model.layers=0"], "model.layers=0"),
        (["model.block.dropout=2"], "model.block.dropout if"),
        (["model.block.dropout=2", "model.embedding.dropout=0"], "model.block.dropout=2"),
        (["model.embedding.dropout=2"], "model.embedding.dropout=2"),
        (["model.block.feed_forward.hidden=0"], "model.block.feed_forward.hidden .*got 0"),
        (["model.rotary_base=0"], "model.rotary_base .*got 0"),
        (["+model.attention.none=null", "model.layout=[none]"], r"\['dense'\], got \['none'\]"),
        (["model.layout=[sparse]"], r"\['sparse'\]"),
        (["model.stack=reversed"], "model.stack .*plain, recompute, got reversed"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_with_its_values(overrides, message):
    with pytest.raises(Exception, match=message):
        build("dense", *overrides)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("border", [0, 1, 100])
def test_a_packed_document_sees_none_of_the_one_before_it(name, border, device):
    model = build(name).to(device)
    for block in model.blocks:  # zero-initialised projections would hide what they pass
        torch.nn.init.normal_(block.attention.projections.out.weight, std=0.2)
    torch.nn.init.normal_(model.head.weight)
    before = tokens(device)
    before[:, border] = model.vocab_size
    after = before.clone()
    after[:, :border] = (before[:, :border] + 1) % 256
    documents = (before == model.vocab_size).cumsum(dim=1, dtype=torch.int32)
    logits, changed = model(before, documents), model(after, documents)
    assert torch.equal(logits[:, border:], changed[:, border:])
    assert border == 0 or not torch.equal(logits[:, :border], changed[:, :border])


@torch.no_grad()
def test_packed_rows_of_one_document_equal_a_stream(device):
    model = build("dense").to(device)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.blocks[0].attention.projections.out.weight, std=0.2)
    row = tokens(device)
    one = torch.ones_like(row, dtype=torch.int32)
    torch.testing.assert_close(model(row, one), model(row))
