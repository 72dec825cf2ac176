"""Models that predict masked tokens: what they see, how they are trained, and how they are scored.

What is masked is in `test_masking.py`.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch.utils.data import DataLoader

import eval as evaluation_script
from data.batches.batch import Batch, number_documents
from data.batches.windows import PADDING
from evaluation.masked import score_masked
from evaluation.measures import bits_per_masked_byte
from tests.support.commands import WHOLE, curve, place, run, train
from tests.support.configs import BOTH_SIDES, SMALL, composed
from tests.support.tiny import LENGTH, TinyData, TinyModel, fit, rows, tiny_task
from training.objectives import MaskedToken

MASKED = ["objective=masked_token", *BOTH_SIDES]
START, MASK = 256, 257


def build(*overrides):
    """An encoder whose projections pass something on."""
    model = instantiate(composed("model=dense", *SMALL, *MASKED, *overrides).model)
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens(device, length=64):
    return torch.randint(256, (2, length), device=device)


@torch.no_grad()
def test_each_token_that_is_seen_counts_on_both_sides_of_a_mask(device):
    model = build().to(device)
    inputs = tokens(device)
    inputs[:, 30] = MASK
    logits = model(inputs)[:, 30]
    for position in (25, 35, 0):  # before, behind, global
        changed = inputs.clone()
        changed[:, position] = (inputs[:, position] + 1) % 256
        assert not torch.allclose(model(changed)[:, 30], logits), position


def test_the_loss_is_over_masked_positions_only(device):
    model = build().to(device)
    inputs, targets = tokens(device), torch.full((2, 64), -1, device=device)
    targets[:, 5:8] = 7
    nats, count = model.loss(inputs, targets)
    logits = model(inputs)[:, 5:8].double()
    expected = -logits.log_softmax(dim=-1)[:, :, 7].sum()
    assert count == 6
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(device):
    model = build().to(device).eval()
    short = tokens(device, 40)
    padded = F.pad(short, (0, 24), value=START)
    documents = number_documents(F.pad(short, (0, 24), value=PADDING), START)
    torch.testing.assert_close(model(padded, documents)[:, :40], model(short))


def test_the_mask_id_has_an_embedding_of_its_own_in_masked_models_alone():
    causal = instantiate(composed("model=dense", *SMALL).model)
    assert len(causal.embedding.weight) == 257
    embedding = build().embedding.weight
    assert len(embedding) == 258
    assert embedding[MASK].std().item() == pytest.approx(1, abs=0.5)  # as any token's


class Windows:
    """Inputs and targets, by their numbers."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = torch.from_numpy(inputs), torch.from_numpy(targets)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, numbers):
        return Batch(self.inputs[numbers], self.targets[numbers])


def test_a_uniform_model_has_eight_bits_per_masked_byte():
    uniform = instantiate(composed("model=dense", *SMALL, *MASKED).model)  # as long as untrained
    targets = np.where(np.random.default_rng(0).random((9, 8)) < 0.3, 5, -1)
    units = np.ones(256, dtype=np.int64)
    batches = Windows(np.zeros_like(targets), targets)
    sums, _ = score_masked(uniform, batches, units, tokens=72, context=8, batch_tokens=32)
    nats, units = sums.nats.sum(), int(sums.units.sum())
    assert units == sums.tokens.sum() == (targets >= 0).sum()
    assert bits_per_masked_byte(nats, units) == pytest.approx(8, abs=1e-6)


def masked(inputs):
    """A batch of ``(B, L)`` tokens; some rows have more targets than others."""
    few = torch.arange(LENGTH) % (2 + inputs[:, :1]) == 0
    return Batch(inputs, inputs.where(few, -1))


class MaskedRows(TinyData):
    measure = "bits_per_masked_byte"

    def _micro_batches(self):
        yield from (masked(batch.inputs) for batch in super()._micro_batches())

    def val_dataloader(self):
        return DataLoader([masked(rows(4, seed=-1)[:, :-1])], batch_size=None)


def masked_task(share=0.25):
    task = tiny_task()
    task.objective = MaskedToken(share)
    return task


def test_each_masked_token_weighs_the_same_in_whatever_micro_batch_it_is(tmp_path):
    _, whole = fit(tmp_path, masked_task(), MaskedRows())
    _, halves = fit(tmp_path, masked_task(), MaskedRows(accumulation=2))
    for key in ("train/loss_nats", "train/gradient_norm", "val/bits_per_masked_byte"):
        assert halves.curve(key) == pytest.approx(whole.curve(key), abs=1e-5), key


def test_the_gradient_is_that_of_the_mean_over_masked_tokens(tmp_path):
    model, batch = TinyModel(), masked(rows(8, seed=0)[:, :-1])
    nats, count = model.loss(*batch)
    (nats / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    task = masked_task(share=count.item() / batch.inputs.numel())
    _, recorder = fit(tmp_path, task, MaskedRows(), max_steps=1)
    assert recorder.curve("train/gradient_norm")[1] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=masked_token"], "`bigbird` is causal; .*objective=next_token"),
        (BOTH_SIDES, "`both` sees later ones; .*objective=masked_token"),
        ([*MASKED, "model.embedding.mask=false"], "model.embedding.mask=false"),
        ([*MASKED, "data.masking.share=0"], "share=0, masked=0.8"),
    ],
)
def test_an_objective_that_the_attention_cannot_have_is_refused(overrides, words, tmp_path):
    config = composed(*SMALL, *overrides, "run_id=x", f"paths.cache={tmp_path}", "data=sample")
    with pytest.raises(Exception, match=words):
        instantiate(config.data), instantiate(config.task)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, "model=dense", *MASKED, *WHOLE, "trainer.max_steps=20")
    return folder


def evaluate(folder, *arguments):
    """What eval.py writes, without a process of its own."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    evaluation_script.evaluate(
        composed(f"checkpoint={checkpoint}", place(folder)[1], "device=cpu", *arguments,
                 name="eval")
    )  # fmt: skip
    return json.loads((folder / "evaluation.json").read_text())


def test_a_run_learns_and_reports_masked_bytes_alone(folder):
    steps = curve(folder)
    assert steps[0]["val/bits_per_masked_byte"] == pytest.approx(8, abs=1e-4)
    assert steps[20]["val/bits_per_masked_byte"] < 6.5
    assert steps[20]["train/bits_per_masked_byte"] == pytest.approx(
        steps[20]["train/loss_nats"] / math.log(2), rel=1e-5
    )
    for name in ("metrics.jsonl", "train.log"):
        text = (folder / name).read_text()
        assert not any(word in text for word in ("bits_per_byte", "bits per byte", "perplexity"))
    assert {path.name for path in (folder / "samples").iterdir()} == {"attention.png"}
    assert (folder / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_eval_equals_validation_in_training_every_time(folder):
    arguments = ["split=validation"]
    checkpoint = folder / "checkpoints" / "last.ckpt"
    result = run("eval.py", f"checkpoint={checkpoint}", place(folder)[1], "device=cpu", *arguments)
    assert result.returncode == 0, result.stderr
    saved = json.loads((folder / "evaluation.json").read_text())
    in_training = curve(folder)[20]["val/bits_per_masked_byte"]
    assert saved["bits_per_masked_byte"] == pytest.approx(in_training, rel=1e-6)
    masked = 16 * round(0.15 * 64) + round(0.15 * 15)  # 1,039 tokens in windows of 64
    assert saved["masked_bytes_scored"] == saved["masked_tokens_scored"] == masked
    assert (saved["tokens_read"], saved["context"]) == (1039, 64)
    assert not saved.keys() & {"bits_per_byte", "stride", "word_perplexity"}
    for text in (f"{saved['bits_per_masked_byte']:.4f}", "1,039 (all)"):
        assert text in result.stdout
    assert evaluate(folder, *arguments)["bits_per_masked_byte"] == saved["bits_per_masked_byte"]


def test_another_context_is_scored_too(folder):
    assert evaluate(folder, "limit=1000", "context=128")["context"] == 128


@pytest.mark.parametrize("argument", ["stride=32", "prompt=The", "images=2", "context=0"])
def test_what_a_masked_model_cannot_do_is_refused(folder, argument):
    with pytest.raises(ValueError, match=argument.partition("=")[0]):
        evaluate(folder, argument, "limit=100")
