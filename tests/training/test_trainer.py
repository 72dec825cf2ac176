"""The trainer: what it resolves and refuses, when it validates, what it prints and measures."""

import logging
import re
import warnings
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging

import kernels.attend
import kernels.elementwise.qkv
import kernels.elementwise.swiglu
from models.attention.bigbird import BigBirdAttention
from models.attention.longformer import LongformerAttention
from models.embeddings import Embedding
from models.transformer import Transformer
from tests.support.tiny import (
    LENGTH,
    WHOLE_RUN,
    Recorder,
    TinyModel,
    fit,
    tiny_task,
    tiny_trainer,
)
from training.callbacks.compilation import Compilation, compile_model
from training.callbacks.progress_bar import ProgressBar
from training.callbacks.throughput import Throughput
from training.model_settings import adopt_settings
from training.trainer import resolve_compile

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    ("every", "steps"), [(None, [0, 7]), (3, [0, 3, 6, 7]), (7, [0, 7]), (100, [0, 7])]
)
@pytest.mark.parametrize("log_every", [1, 2])
def test_validation_is_logged_at_step_0_at_its_intervals_and_once_at_the_end(
    tmp_path, every, steps, log_every
):
    _, recorder = fit(tmp_path, max_steps=7, validate_every=every, log_every=log_every)
    assert list(recorder.curve("val/bits_per_byte")) == steps
    trained = list(recorder.curve("train/loss_nats"))
    assert trained == list(range(log_every, 8, log_every))


def test_validation_scores_averaged_weights_as_they_are_after_the_step(tmp_path):
    _, plain = fit(tmp_path, validate_every=2)
    # An average that keeps nothing of the past is the weights themselves.
    averaging = EMAWeightAveraging(decay=0.0)
    _, averaged = fit(tmp_path, callbacks=[Throughput(), averaging], validate_every=2)
    assert averaged.curve("val/bits_per_byte") == plain.curve("val/bits_per_byte")


def test_early_stopping_ends_a_run_at_a_validation(tmp_path):
    stop = EarlyStopping("val/bits_per_byte", stopping_threshold=100.0)
    trainer, recorder = fit(tmp_path, callbacks=[stop], max_steps=50, validate_every=2)
    assert trainer.global_step <= 2
    assert list(recorder.curve("val/bits_per_byte"))[-1] == trainer.global_step


def test_the_model_is_back_in_training_mode_after_a_validation(tmp_path):
    task = tiny_task()
    fit(tmp_path, task, validate_every=1)
    assert task.model.training


def test_throughput_is_logged_with_its_units(tmp_path):
    _, recorder = fit(tmp_path, callbacks=[Throughput()], log_every=2)
    assert list(recorder.curve("tokens_per_second")) == [2, 4, 6]
    for row in (recorder.metrics[step] for step in (2, 4, 6)):
        flops = row["tokens_per_second"] * TinyModel().flops_per_token(LENGTH)
        assert row["model_tflops_per_second"] == pytest.approx(flops / 1e12, rel=1e-5)
        assert 0 <= row["data_wait_share"] < 1


def test_without_a_terminal_each_logged_step_and_validation_is_one_line(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "strider"):
        fit(tmp_path, callbacks=[Throughput(), ProgressBar()], max_steps=4, log_every=2)
    lines = [record.getMessage() for record in caplog.records if record.name == "strider"]
    number = r"[\d.,]+"
    patterns = [
        "1 x CPU, precision 32-true",
        f"step 0 · validation: {number} bits per byte",
        f"step 2 · 50.0 % · loss {number} nats · {number} bits per byte · {number} tokens/s"
        r" · \d\d:\d\d left",
        f"step 4 · validation: {number} bits per byte",
        "step 4 · 100.0 % · .* · 00:00 left",
    ]
    assert len(lines) == len(patterns)
    for expected, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(expected, line), line


def test_on_a_terminal_a_bar_shows_the_share_and_the_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fit(tmp_path, callbacks=[ProgressBar()], max_steps=4)
    shown = capsys.readouterr().err
    assert "100.0 %" in shown
    assert "bits per byte" in shown
    assert "00:00 left" in shown


def test_lightning_and_python_warn_the_user_of_nothing(tmp_path, caplog, capsys):
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
        warnings.simplefilter("default")
        fit(tmp_path, max_steps=2, validate_every=1)
    assert [str(w.message) for w in caught] == []
    assert {record.name for record in caplog.records} <= {"strider"}
    assert capsys.readouterr().out == ""


def test_compiling_blocks_renames_no_parameter(tmp_path):
    model = TinyModel()
    names = list(model.state_dict())
    compile_model(model)
    assert list(model.state_dict()) == names


def test_a_compiled_run_says_so_and_learns_what_a_plain_one_does(tmp_path, caplog):
    _, plain = fit(tmp_path, max_steps=3)
    task = tiny_task()
    with caplog.at_level(logging.INFO, "strider"):
        _, compiled = fit(tmp_path, task, max_steps=3, compile=True)
    lines = [record.getMessage() for record in caplog.records if "compil" in record.getMessage()]
    assert len(lines) == 2
    assert re.fullmatch(r"compiled: the first pass of training took \d+ s", lines[1])
    assert all(block._compiled_call_impl is not None for block in task.model.blocks)
    expected = plain.curve("train/loss_nats")
    assert compiled.curve("train/loss_nats") == pytest.approx(expected, abs=1e-5)


def test_blocks_are_compiled_by_default_on_a_gpu_and_not_on_a_cpu(tmp_path):
    def compiles(**settings):
        trainer = tiny_trainer(tmp_path, Recorder(), **settings)
        return any(isinstance(callback, Compilation) for callback in trainer.callbacks)

    assert not compiles(compile="auto")
    assert compiles(compile=True)
    assert resolve_compile("auto", "gpu")
    assert not resolve_compile(False, "gpu")


def transformer(attention, layers: int) -> Transformer:
    return Transformer(
        dim=32, layers=layers, heads=2, attention={"a": attention}, layout=["a"],
        embedding=partial(Embedding, vocab_size=16),
    )  # fmt: skip


@pytest.fixture
def graphs(monkeypatch) -> list:
    """What torch.compile makes from here on, of models that choose their kernels as on a GPU."""
    found = []

    def keep(graph, inputs):
        found.append(graph)
        return graph.forward

    for module in (kernels.attend, kernels.elementwise.qkv, kernels.elementwise.swiglu):
        monkeypatch.setattr(module, "choose", lambda *_: "fused")
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_in_place, backend=keep))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(  # torch's own, whatever an earlier test has compiled
        recompile_limit=8, accumulated_recompile_limit=256, allow_unspec_int_on_nn_module=False,
        fail_on_recompile_limit_hit=True,
    ):  # fmt: skip
        yield found


@pytest.mark.parametrize(
    ("attention", "blocks"),
    [
        (partial(BigBirdAttention, block=16), 1),
        # A first window, all others, and those that hide nothing.
        (partial(LongformerAttention, window=[2, 3, 4, 5, 6, 7, 8, 40, 50]), 3),
    ],
)
def test_one_graph_serves_layers_that_differ_in_numbers(attention, blocks, graphs, kernel_device):
    model = transformer(attention, layers=9).to(kernel_device)
    compile_model(model)
    with torch.no_grad():
        model(torch.randint(16, (1, 32), device=kernel_device))
    assert len(graphs) == blocks + 1  # and one of the head


def test_phases_with_other_lengths_and_windows_need_few_graphs(graphs, kernel_device):
    phases, layers = 3, 4
    attention = partial(LongformerAttention, dilation=[1, 1, 2, 3])
    model = transformer(partial(attention, window=4), layers).to(kernel_device)
    compile_model(model)
    for phase in range(phases):
        windows = [2 + phase * layers + n for n in range(layers)]
        with torch.device("meta"):
            adopt_settings(model, transformer(partial(attention, window=windows), layers))
        tokens = torch.randint(16, (1, 8 * 2**phase + 1), device=kernel_device)
        for training in (False, True):
            model.train(training)
            with torch.set_grad_enabled(training):
                nats, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
            if training:
                nats.backward()
    assert len(graphs) <= 10  # not one for each layer, phase, and training or validation


def test_auto_takes_the_cpu_in_full_precision_where_there_is_no_gpu(tmp_path, no_gpu):
    trainer = tiny_trainer(tmp_path, Recorder(), accelerator="auto")
    assert trainer.precision == "32-true"
    assert trainer.strategy.root_device.type == "cpu"


def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path, no_gpu):
    with pytest.raises(ValueError, match=r"needs a CUDA GPU.*trainer=cpu"):
        tiny_trainer(tmp_path, Recorder(), accelerator="gpu")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"precision": "16-mixed"}, "got 16-mixed; set `trainer.precision`"),
        ({"max_steps": None}, "set `trainer.max_steps` or `trainer.max_minutes`"),
        ({"validate_every": 0}, "got 0; set `trainer.validate_every`"),
        ({"log_every": 0}, "got 0; set `trainer.log_every`"),
        ({"gradient_clip": 0.0}, "got 0.0; set `trainer.gradient_clip`"),
        ({"gradient_clip": float("nan")}, "got nan; set `trainer.gradient_clip`"),
        ({"compile": "yes"}, "trainer.compile must be auto, true or false, got yes"),
        ({"devices": -1}, "trainer.devices must be auto or at least 1, got -1"),
        ({"accelerator": "tpu"}, "auto, cpu or gpu, got tpu"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_key(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, Recorder(), **setting)


@pytest.mark.parametrize("choice", ["auto", "cpu", "ddp"])
def test_every_trainer_config_makes_a_trainer(tmp_path, choice):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(f"trainer/{choice}").trainer
    make = instantiate(config, max_steps=6)
    trainer = make(output=tmp_path, callbacks=[], loggers=[], phases=[WHOLE_RUN])
    assert trainer.max_steps == 6


@pytest.mark.parametrize("path", sorted(CONF.glob("optimizer/*.yaml")), ids=lambda p: p.stem)
def test_every_optimizer_config_makes_an_optimizer(path):
    optimizer = instantiate(yaml.safe_load(path.read_text()))(TinyModel())
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == 8


@pytest.mark.parametrize("path", sorted(CONF.glob("schedule/*.yaml")), ids=lambda p: p.stem)
def test_every_schedule_config_makes_a_schedule(path):
    assert instantiate(yaml.safe_load(path.read_text()))(10**6, 0.0) == 1.0
