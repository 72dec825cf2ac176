"""Positions of images: every token knows its row, column and channel."""

import pytest
import torch
from hydra.utils import instantiate

from models.embeddings import Embedding, RasterPositions, rotary_tables
from tests.support.configs import composed

SMALL = ["model.dim=32", "model.heads=2", "model.layers=2", "run_id=x"]


def build(*overrides):
    return instantiate(composed("data=cifar10", *SMALL, *overrides).model)


def test_every_place_is_the_sum_of_its_row_column_and_channel():
    positions = RasterPositions(8, [4, 5, 3])
    entries = positions(torch.arange(60)).reshape(4, 5, 3, 8)
    rows, columns, channels = positions.coordinates
    for row, column, channel in [(0, 0, 0), (0, 0, 2), (0, 1, 0), (2, 4, 1), (3, 4, 2)]:
        expected = rows.weight[row] + columns.weight[column] + channels.weight[channel]
        torch.testing.assert_close(entries[row, column, channel], expected)


def test_positions_may_begin_at_a_number_that_only_their_device_knows():
    embedding, first = Embedding(8, vocab_size=5, matrix_shape=[12, 5]), torch.tensor(41)
    tokens = torch.randint(5, (1, 60))
    assert torch.equal(embedding(tokens[:, 41:43], first), embedding(tokens)[:, 41:43])
    later, whole = first + torch.arange(2), torch.arange(60)
    for found, wanted in zip(
        rotary_tables(later, 8, 1e4), rotary_tables(whole, 8, 1e4), strict=True
    ):
        assert torch.equal(found, wanted[41:43])


def test_the_sum_has_the_spread_that_was_asked_for():
    positions = RasterPositions(256, [32, 32, 3])
    positions.draw(0.5)
    assert positions(torch.arange(3072)).std().item() == pytest.approx(0.5, rel=0.1)


def test_a_token_beyond_the_image_is_refused():
    with pytest.raises(ValueError, match=r"reach 3,072 tokens .* got 3,073"):
        build()(torch.zeros(1, 3073, dtype=torch.long))


@pytest.mark.parametrize("shape", ["[32]", "[32,0,3]", "[]"])
def test_a_shape_that_is_no_image_is_refused(shape):
    with pytest.raises(Exception, match=r"learned positions need two or more sizes, .* got \["):
        build(f"model.embedding.image_shape={shape}")


def randomised(model):
    for parameter in model.parameters():  # a new block is the identity
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("model", ["bigbird", "dense"])
@pytest.mark.parametrize("rotary", ["10000.0", "null"])
def test_an_image_model_predicts_by_place_and_only_from_the_past(model, rotary):
    model = randomised(build(f"model={model}", f"model.rotary_base={rotary}"))
    tokens = torch.full((1, 300), 7)
    logits = model(tokens)
    assert not torch.allclose(logits[0, 100], logits[0, 101])  # equal tokens, other places
    changed = tokens.clone()
    changed[0, 200:] = 9
    after = model(changed)
    assert torch.equal(after[:, :200], logits[:, :200])
    assert not torch.equal(after[:, 200:], logits[:, 200:])


@torch.no_grad()
def test_without_any_positions_a_dense_model_cannot_tell_equal_tokens_apart():
    model = randomised(
        build("model=dense", "model.rotary_base=null", "model.embedding.image_shape=null")
    )
    logits = model(torch.full((1, 50), 7))
    torch.testing.assert_close(logits[0, 10], logits[0, 40])


@pytest.mark.parametrize("rotary", ["10000.0", "null"])
def test_positions_learn(rotary):
    model = randomised(build(f"model.rotary_base={rotary}"))
    nats, count = model.loss(torch.randint(256, (1, 3072)), torch.randint(256, (1, 3072)))
    (nats / count).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_text_has_no_image_positions():
    assert not instantiate(composed("data=sample", *SMALL).model).embedding.positions
