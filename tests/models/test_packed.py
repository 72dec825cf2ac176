"""Packed = alone: documents in a row give the logits and gradients that each gives by itself."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from data.batches.batch import NextTokenBatches
from data.batches.masking import MaskedBatches, Masking
from data.batches.windows import EvaluationWindows, Stream
from data.corpora import Split
from tests.support.configs import CONF, MODELS, SMALL, composed

START = 256
ROWS = [[1, 300, 37, 64, 2, 1, 130, 65], [5, 129, 3, 200, 1, 1, 15, 246]]  # tokens of documents

MATRIX = ["model.rotary_base=null", "model.embedding.matrix_shape=[20,30]"]
BIGBIRD = ["model=bigbird", "model.attention.bigbird.block=8"]
GLOBAL = ["model=longformer", "model.attention.longformer={window: 8, global_tokens: 3}"]
DENSE_ENCODER = ["model=dense", "model.attention.dense.causal=false"]
BIGBIRD_ENCODER = [*BIGBIRD, "model.attention.bigbird={causal: false, random_blocks: 0}"]
LONGFORMER_ENCODER = [*GLOBAL, "model.attention.longformer.causal=false"]
CASES = [
    *([f"model={name}"] for name in MODELS),
    *([f"model={name}", *MATRIX] for name in MODELS),
    [*BIGBIRD],
    [*BIGBIRD, "model.attention.bigbird.global_tokens=5"],
    GLOBAL,
    ["model=longformer", "model.attention.longformer={window: [8,16], dilation: 3}"],
    ["model=sparse_transformer", "model.attention.sparse_transformer={stride: 16, cells: 4}"],
    ["model=sparse_transformer", "model.attention.sparse_transformer={stride: 16, kind: strided}"],
    ["model=sparse_transformer", *MATRIX,
     "model.attention.sparse_transformer={stride: 16, cells: 4, use: layers}"],
    DENSE_ENCODER,
    BIGBIRD_ENCODER,
    [*BIGBIRD_ENCODER, *MATRIX],
    LONGFORMER_ENCODER,
    [*LONGFORMER_ENCODER, "model.attention.longformer.global_tokens=70", *MATRIX],
    [*LONGFORMER_ENCODER, "model.attention.longformer.global_projections=false"],
]  # fmt: skip

# Two layers in place of many. What is of the row is left out, and tokens of each document stand for
# vectors in front of it.
CHANGED = {
    "longformer_enwik8_small": ["model.attention.longformer.dilation=[1,4]"],
    "longformer_enwik8_large": ["model.attention.longformer.dilation=[1,4]"],
    "bigbird_mlm": ["model.attention.bigbird.random_blocks=0"],
    "bigbird_mlm_etc": [
        "model.embedding.global_vectors=0",
        "model.attention.bigbird.global_tokens=16",
    ],
    "longformer_mlm": [
        "model.embedding.global_vectors=0",
        "model.attention.longformer.global_tokens=16",
    ],
}
NARROW = ["run_id=x", "model.dim=32", "model.heads=2", "model.layers=2"]
EXPERIMENTS = [
    [f"experiment={path.stem}", *NARROW, *CHANGED.get(path.stem, [])]
    for path in sorted((CONF / "experiment").glob("*.yaml"))
]


def build(*overrides, small=SMALL):
    """A model in float64 that has learned nothing but does something: no matrix of it is zero."""
    torch.manual_seed(0)
    model = instantiate(composed(*small, *overrides).model).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2 or not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def documents_of(*sizes):
    """The number of the document of each token, ``(1, L)``."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None].int()


def assert_equal(model, found, wanted):
    """Rotary positions, in float32, turn by other angles of the same difference."""
    exact = model.rotary_base is None and found[0].dtype == torch.float64
    limit = 1e-10 if exact else 1e-4
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= limit * other.abs().max()


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_documents_in_a_row_are_as_each_alone(overrides, device):
    check_each_alone(build(*overrides).to(device))


@pytest.mark.parametrize("overrides", EXPERIMENTS, ids=" ".join)
def test_documents_of_an_experiment_are_as_each_alone(overrides, device):
    check_each_alone(build(*overrides, small=[]).to(device))


def check_each_alone(model):
    device = next(model.parameters()).device
    if device.type == "cuda":  # the kernels take no float64
        model = model.float()
    tokens = torch.randint(START + 1, (len(ROWS), sum(ROWS[0])), device=device)
    documents = torch.cat([documents_of(*sizes) for sizes in ROWS]).to(device)
    cotangent = torch.randn(*tokens.shape, 256, device=device)
    parameters = list(model.parameters())

    packed = model(tokens, documents)
    gradients = torch.autograd.grad((packed * cotangent).sum(), parameters)
    pieces = [piece for row, sizes in zip(tokens, ROWS, strict=True) for piece in row.split(sizes)]
    alone = torch.cat([model(piece[None])[0] for piece in pieces])
    wanted = torch.autograd.grad((alone * cotangent.flatten(0, 1)).sum(), parameters)

    assert_equal(model, [packed.flatten(0, 1)], [alone])
    assert_equal(model, gradients, wanted)


# ---------------------------------------------------------------------------------- through data

TEXTS = [40, 1, 17, 3, 90, 25]  # tokens of documents, 176 in all


def stream(documents):
    tokens = np.random.default_rng(0).integers(START, size=sum(TEXTS)).astype(np.uint8)
    starts = np.cumsum([0, *TEXTS[:-1]])
    return Stream(Split(tokens, starts), documents, START)


@torch.no_grad()
@pytest.mark.parametrize("length", [16, 50, 200])
@pytest.mark.parametrize("overrides", [BIGBIRD, GLOBAL, [*GLOBAL, *MATRIX]], ids=" ".join)
def test_packed_rows_score_every_token_once_and_as_if_its_document_stood_alone(overrides, length):
    model, text = build(*overrides), stream("pack")
    windows = EvaluationWindows(text, length)
    inputs, targets, documents = NextTokenBatches(windows, START, pack=True)[range(len(windows))]
    assert targets[targets >= 0].tolist() == text.tokens.tolist()

    packed, alone = model.nats(inputs, targets, documents), torch.zeros(inputs.shape)
    for row, numbers in enumerate(documents):
        for number in numbers.unique():
            own = numbers == number
            alone[row, own] = model.nats(inputs[row, own][None], targets[row, own][None])[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("documents", ["stream", "pack", "split"])
@pytest.mark.parametrize(
    "overrides",
    [
        DENSE_ENCODER,
        BIGBIRD_ENCODER,
        LONGFORMER_ENCODER,
        [*LONGFORMER_ENCODER, "model.embedding.matrix_shape=[100,10]"],
        [*LONGFORMER_ENCODER, "model.embedding.global_vectors=3"],
        [*BIGBIRD_ENCODER, "model.embedding.global_vectors=20"],
    ],
    ids=" ".join,
)
def test_a_masked_token_does_not_see_how_much_padding_its_row_has(overrides, documents):
    if documents == "pack" and "model.embedding.global_vectors" in overrides[-1]:
        pytest.skip("refused: the vectors of a row are of one document")
    model = build(*overrides, "model.embedding.mask=true")
    text, scores = stream(documents), []
    for length in (200, 201, 300):  # each window is a whole span
        windows = EvaluationWindows(text, length)
        batches = MaskedBatches(windows, Masking(0.3, 0.8, 0.1), START, (0,), documents=True)
        inputs, targets, numbers = batches[range(len(windows) + 1)]  # the last is padding only
        assert (inputs[:, -1] == START).all()
        assert (targets[-1] < 0).all()
        scores.append(model.nats(inputs, targets, numbers)[targets >= 0])
    for more in scores[1:]:
        torch.testing.assert_close(more, scores[0], rtol=1e-5, atol=1e-6)
