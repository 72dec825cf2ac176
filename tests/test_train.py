"""train.py as a user runs it: what it leaves behind, resuming, several processes, interruption."""

import json
import math
import re
import signal
import subprocess
import time

import pytest
import yaml

from tests.support.commands import ROOT, TINY, command, curve, environment, place, run, train
from tests.support.configs import composed
from train import main, without_null
from training.config.validate import GROUPS
from training.run.checkpoint import read_checkpoint

HARD = [  # everything that could make a resumed run another run
    "trainer.max_steps=12", "data.micro_tokens=256", "data.workers=2", "model.block.dropout=0.2",
    "callbacks=ema", "callbacks.checkpoints.every_steps=4", "trainer.validate_every=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = train(folder, "trainer.max_steps=30", "trainer.validate_every=20")
    return folder, result


def test_a_run_learns_and_its_folder_explains_it(finished):
    folder, _ = finished
    steps = curve(folder)
    assert list(steps) == list(range(31))
    assert steps[0]["val/bits_per_byte"] == pytest.approx(8, abs=1e-4)
    assert [step for step in steps if "val/bits_per_byte" in steps[step]] == [0, 20, 30]
    assert steps[30]["val/bits_per_byte"] < 6
    assert steps[30]["train/bits_per_byte"] == pytest.approx(
        steps[30]["train/loss_nats"] / math.log(2), rel=1e-5
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["dim"] == 32
    assert "causal keys" in (folder / "train.log").read_text()
    for name in ("last", "best"):
        checkpoint = read_checkpoint(folder / "checkpoints" / f"{name}.ckpt")
        assert yaml.safe_load(checkpoint["config"]) == config
    assert (folder / "samples" / "step-30.txt").read_text().startswith("The ")
    assert (folder / "samples" / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_the_console_says_what_is_trained_and_how_it_goes(finished):
    _, result = finished
    for text in ("causal keys", "bits per byte", "tokens/s", "left", "python eval.py checkpoint="):
        assert text in result.stdout, text
    assert "warn" not in (result.stdout + result.stderr).lower()


def test_the_same_command_again_finds_the_run_finished(finished):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    train(folder, "trainer.max_steps=30", "trainer.validate_every=20")
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_run_killed_between_two_saves_resumes_to_the_same_curve_bit_for_bit(tmp_path):
    train(tmp_path / "whole", *HARD)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command("train.py", *TINY, *place(killed), *HARD), cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(killed, 10)
    process.kill()
    process.wait()
    saved = read_checkpoint(killed / "checkpoints" / "last.ckpt")["global_step"]
    assert 0 < saved < 12
    result = train(killed, *HARD)
    assert f"after step {saved}" in result.stdout
    assert curve(killed) == curve(tmp_path / "whole")


def wait_for_step(folder, step, seconds=120):
    metrics = folder / "metrics.jsonl"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {seconds} s")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_checkpoint_and_says_so_by_its_status(tmp_path, number):
    folder = tmp_path / "run"
    arguments = [*TINY, *place(folder), "trainer.max_steps=100000", "data.workers=2"]
    process = subprocess.Popen(
        command("train.py", *arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_step(folder, 5)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    steps = list(curve(folder))
    saved = read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"]
    assert saved == steps[-1] >= 5
    train(folder, "trainer.max_steps=100000", "data.workers=2", f"trainer.max_steps={saved + 2}")
    assert list(curve(folder)) == list(range(saved + 3))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_reproduce_the_curve_of_one_with_the_same_batch(tmp_path, optimizer):
    settings = ["trainer.max_steps=100", "model.layers=1", f"optimizer={optimizer}"]
    train(tmp_path / "one", *settings)
    train(
        tmp_path / "two", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", *settings
    )
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert list(one) == list(two) == list(range(101))
    for step in one:
        for key in ("train/loss_nats", "val/bits_per_byte"):
            assert one[step].get(key) == pytest.approx(two[step].get(key), abs=1e-5), step


@pytest.mark.slow
def test_resume_null_keeps_the_run_that_was_there(tmp_path):
    folder = tmp_path / "run"
    train(folder, "trainer.max_steps=2")
    train(folder, "trainer.max_steps=3", "resume=null")
    assert max(curve(folder)) == 3
    assert max(curve(tmp_path / "run.1")) == 2


def test_any_byte_file_trains_under_the_name_it_is_given(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_bytes(b"All happy families are alike. " * 2000)
    arguments = [
        "data=bytes",
        f"data.path={text}",
        "data.name=tolstoy",
        "data.validation_tokens=500",
    ]
    result = train(tmp_path / "run", *arguments, "trainer.max_steps=2")
    assert "data: tolstoy" in result.stdout
    name = run("train.py", *TINY, *arguments, "--cfg", "job").stdout
    assert "tolstoy" in name


def test_help_is_readable():
    text = run("train.py", "--help").stdout
    assert "python train.py model=bigbird data=enwik8" in text
    for word in ("model:", "bigbird", "dense", "trainer.max_minutes", "resume=auto|PATH|null"):
        assert word in text, word


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.heads=3"], ["dim=32", "heads=3", "model.heads"]),
        (["model.attention.bigbird.block=0"], ["block=0"]),
        (["+model.attention.bigbird.blok=4"], ["BigBirdAttention", "blok", "block"]),
        (["~model.attention.bigbird._partial_"], ["BigBirdAttention lacks 'dim'", "_partial_"]),
        (["data.length=4194304", "data.batch_tokens=4194304"], ["data.length=4194304"]),
        (["data.batch_tokens=1000"], ["data.batch_tokens=1000", "data.length"]),
        (["data=bytes"], ["data.path"]),
        (["data=bytes", "data.path=/no/such/file"], ["/no/such/file"]),
        (["data=bytes", "data.path=3"], ["3 is not a file; correct data.path"]),
        (["data=enwik8", "data.path=data/samples/enwik8-prefix.xz"], ["data=bytes", "4,154,399"]),
        (["data=pg19_sample", "data.tokenizer=null"], ["data.tokenizer", "bytes", "got null"]),
        (
            ["objective=masked_token", "data.masking=null"],
            ["refers to ${data.masking.share}"],
        ),
        (["resume=/no/such.ckpt"], ["/no/such.ckpt"]),
        (["trainer.max_steps=1e3"], ["trainer.max_steps", "whole number", "1000.0"]),
        (["model.attention.bigbird.block=two"], ["bigbird.block", "whole number", "'two'"]),
        (["model.block.dropout=null"], ["dropout", "a number", "null"]),
        (
            ["model.block.feed_forward=null"],
            ["model.block.feed_forward must be a mapping, got null"],
        ),
        (["trainer.max_steps=null"], ["trainer.max_minutes"]),
        (["trainer=base"], ["`trainer.accelerator` has no value"]),
        (["~trainer.devices"], ["make_trainer lacks 'devices'"]),
        (["model.layout=bigbird"], ["model.layout", "a list of names", "'bigbird'"]),
        (["optimizer.adamw_betas=[0.9]"], ["adamw_betas", "a list of 2 numbers", "[0.9]"]),
        (["optimizer.lr=abc"], ["error: optimizer.lr must be a number"]),
        (
            ["optimizer._target_=training.optim.optimizers.mu"],
            ["optimizer._target_", "optimizers.mu'"],
        ),
        (["optimizer._target_=null"], ["optimizer._target_", "got null"]),
        (["callbacks.samples.top_p=2"], ["top_p=2"]),
        (["callbacks.samples=3"], ["callbacks", "null", "got 3"]),
        (["trainer.precision=16"], ["16", "bf16-mixed"]),
        (["schedule.decay=2"], ["decay"]),
        (["seed=-1"], ["seed", "from 0 to 4,294,967,295, got -1"]),
        (["seed=null"], ["error: seed", "got null"]),
        (["paths.output="], ["paths.output must be the path of a folder, got ''"]),
        (["paths.cache=3"], ["paths.cache must be the path of a folder, got 3"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_before_training_starts(
    tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.setattr("train.show_log", lambda: None)  # which later tests would not see past
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # which Lightning sets
    with pytest.raises(SystemExit) as leaving:
        main(composed(*TINY, *place(tmp_path / "run"), *arguments))
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("more", [[], ["experiment=quickstart"]])  # which fills in some keys
def test_a_group_without_a_choice_is_one_sentence(group, more, monkeypatch, capsys):
    monkeypatch.setattr("train.show_log", lambda: None)
    with pytest.raises(SystemExit):
        main(composed(without_null(f"{group}=null"), *more))
    message = capsys.readouterr().err
    assert re.fullmatch(rf"error: {group} must be one of [\w, ]+, got null.\n", message)


def test_no_experiment_may_be_asked_for():
    assert composed(without_null("experiment=null")) == composed()
    assert without_null("resume=null") == "resume=null"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["model.dimm=64"], 1, ["dimm"]),
        (["model=bigbrid"], 1, ["bigbrid", "bigbird"]),
        (["logger=null"], 2, ["error: logger must be one of jsonl, tensorboard, wandb, got null"]),
        (["logger=wandb"], 2, ["error: ", "wandb"]),
    ],
    ids=str,
)
def test_a_mistake_has_no_traceback(tmp_path, arguments, status, words):
    result = run("train.py", *TINY, *place(tmp_path / "run"), *arguments, WANDB_API_KEY="")
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    written = (tmp_path / "run").exists()
    assert written == (arguments == ["logger=wandb"])  # a logger opens in the run's folder
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_traceback_is_there_for_who_wants_it(tmp_path):
    result = run("train.py", *TINY, *place(tmp_path / "r"), "model.heads=3", HYDRA_FULL_ERROR="1")
    assert "Traceback" in result.stderr


def test_metrics_are_numbers_in_plain_json(finished):
    folder, _ = finished
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert all(isinstance(value, int | float) for value in json.loads(line).values())
