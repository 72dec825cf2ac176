"""Packed = alone: documents in a row give the logits and gradients that each gives by itself."""

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from data.batches.batch import NextTokenBatches
from data.batches.windows import EvaluationWindows, Stream
from data.corpora import Split
from tests.support.configs import MODELS, SMALL, composed

START = 256
ROWS = [[1, 300, 37, 64, 2, 1, 130, 65], [5, 129, 3, 200, 1, 1, 15, 246]]  # tokens of documents

MATRIX = ["model.rotary_base=null", "model.embedding.matrix_shape=[20,30]"]
BIGBIRD = ["model=bigbird", "model.attention.bigbird.block=8"]
ENCODER = [*BIGBIRD, "model.attention.bigbird.causal=false", "model.attention.bigbird.random_blocks=0"]
LONGFORMER = ["model=longformer", "model.attention.longformer.causal=false"]
CASES = [
    *([f"model={name}"] for name in MODELS),
    *([f"model={name}", *MATRIX] for name in MODELS),
    [*BIGBIRD],
    [*BIGBIRD, "model.attention.bigbird.global_tokens=5"],
    ["model=longformer", "model.attention.longformer={window: [8,16], dilation: 3, dilated_heads: 1}"],
    ["model=longformer", "model.attention.longformer={window: 8, global_tokens: 3}"],
    ["model=sparse_transformer", "model.attention.sparse_transformer={stride: 16, cells: 4}"],
    ["model=sparse_transformer", "model.attention.sparse_transformer={stride: 16, kind: strided}"],
    ["model=sparse_transformer", "model.attention.sparse_transformer={stride: 16, cells: 4, use: layers}"],
    ["model=dense", "model.attention.dense.causal=false"],
    ENCODER,
    [*ENCODER, *MATRIX],
    [*LONGFORMER, "model.attention.longformer={window: 8, global_tokens: 6}"],
    [*LONGFORMER, "model.attention.longformer={window: 8, global_tokens: 70}", *MATRIX],
    [*LONGFORMER, "model.attention.longformer={window: 8, global_tokens: 6, "
     "global_projections: false}"],
]  # fmt: skip


def build(*overrides):
    """A model in float64 that has learned nothing but does something: no matrix of it is zero."""
    torch.manual_seed(0)
    model = instantiate(composed(*SMALL, *overrides).model).double()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def documents_of(*sizes):
    """The number of the document of each token, ``(1, L)``."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None].int()


def assert_equal(model, found, wanted):
    """Rotary positions, in float32, turn by other angles of the same difference."""
    limit = 1e-10 if model.rotary_base is None else 1e-4
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= limit * other.abs().max()


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_documents_in_a_row_are_as_each_alone(overrides):
    model = build(*overrides)
    tokens = torch.randint(START + 1, (len(ROWS), sum(ROWS[0])))
    documents = torch.cat([documents_of(*sizes) for sizes in ROWS])
    cotangent = torch.randn(*tokens.shape, 256, dtype=torch.float64)
    parameters = list(model.parameters())

    packed = model(tokens, documents)
    gradients = torch.autograd.grad((packed * cotangent).sum(), parameters)
    pieces = [piece for row, sizes in zip(tokens, ROWS, strict=True) for piece in row.split(sizes)]
    alone = torch.cat([model(piece[None])[0] for piece in pieces])
    wanted = torch.autograd.grad((alone * cotangent.flatten(0, 1)).sum(), parameters)

    assert_equal(model, [packed.flatten(0, 1)], [alone])
    assert_equal(model, gradients, wanted)
