"""eval.py as a user runs it: the table, the file, exact counts, distrust of strangers' files."""

import json
import os

import pytest
import torch
import yaml

from eval import main
from tests.support.commands import WHOLE, place, run, train
from tests.support.configs import composed
from training.run.checkpoint import rebuild


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, *WHOLE, "trainer.max_steps=20", "model.layers=1")
    return folder


def of_run(folder):
    return [f"checkpoint={folder / 'checkpoints' / 'best.ckpt'}", place(folder)[1]]


def evaluate(folder, *arguments):
    return run("eval.py", *of_run(folder), *arguments)


def test_the_table_and_the_file_say_the_same(folder):
    result = evaluate(folder, "limit=5000", "context=64", "stride=32")
    assert result.returncode == 0, result.stderr
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved["bytes_scored"] == 5000
    assert saved["tokens_in_split"] == 207_720
    assert (saved["context"], saved["stride"], saved["split"]) == (64, 32, "test")
    assert saved["step"] == 20
    assert 3 < saved["bits_per_byte"] < 8
    for text in (f"{saved['bits_per_byte']:.4f}", "5,000 (the first of 207,720)", "enwik8-prefix"):
        assert text in result.stdout, text


def test_validation_here_equals_validation_in_training(folder):
    evaluate(folder, "split=validation", "context=64", "stride=64")
    saved = json.loads((folder / "evaluation.json").read_text())
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    in_training = [m["val/bits_per_byte"] for m in last if "val/bits_per_byte" in m][-1]
    # Both score the same bytes; only the last window differs: here it is as long as others.
    assert saved["bits_per_byte"] == pytest.approx(in_training, rel=0.01)


@pytest.mark.slow
def test_more_context_is_used(folder):
    bits = []
    for stride in (1, 64):
        evaluate(folder, "limit=1500", "context=64", f"stride={stride}")
        bits.append(json.loads((folder / "evaluation.json").read_text())["bits_per_byte"])
    assert bits[0] != bits[1]


def test_a_prompt_is_continued_the_same_way_each_time(folder):
    prompt = "Once, it's [said] \\n ${so}, upon a "
    arguments = ["limit=100", f"prompt={prompt}", "sample_tokens=20"]
    texts = [evaluate(folder, *arguments).stdout.split("\n\n", 1)[-1] for _ in range(2)]
    assert texts[0].startswith(prompt)
    assert texts[0] == texts[1]


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("script", ["eval.py", "train.py"])
def test_a_checkpoint_with_code_in_it_is_refused_and_does_not_run(tmp_path, script):
    hostile, target = tmp_path / "hostile.ckpt", tmp_path / "executed"
    torch.save({"state_dict": {}, "config": "", "payload": Bomb(target)}, hostile)
    key = "checkpoint" if script == "eval.py" else "resume"
    result = run(script, f"{key}={hostile}", f"paths.output={tmp_path / 'run'}" if key == "resume"
                 else "limit=1")  # fmt: skip
    assert result.returncode == 2
    assert "refused" in result.stderr
    assert not target.exists()


@pytest.mark.parametrize("target", ["os.system", "torch.load", "models.transformer.torch.load"])
def test_a_config_that_names_anything_but_our_classes_is_refused(folder, tmp_path, target):
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    config = yaml.safe_load(checkpoint["config"])
    config["model"]["attention"]["bigbird"]["_target_"] = target
    checkpoint["config"] = yaml.safe_dump(config)
    hostile = tmp_path / "hostile.ckpt"
    torch.save(checkpoint, hostile)
    result = run("eval.py", f"checkpoint={hostile}", place(folder)[1])
    assert result.returncode == 2
    assert "refused" in result.stderr
    assert target in result.stderr


PACKAGE = """
from models.attention.pattern import PatternAttention

class Mine(PatternAttention):
    def __init__(self, dim, heads, layer, *, reach):
        super().__init__(dim, heads, layer, pattern=f"causal() & window({reach})")

def function(dim, heads, layer):
    return Mine(dim, heads, layer, reach=2)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run whose attention is of a package of the user's own, and the folder of that."""
    packages = tmp_path_factory.mktemp("packages")
    (packages / "mypackage").mkdir()
    (packages / "mypackage" / "__init__.py").write_text("from mypackage.attention import Mine\n")
    (packages / "mypackage" / "attention.py").write_text(PACKAGE)
    folder = tmp_path_factory.mktemp("runs") / "own"
    attention = "{_target_: mypackage.Mine, _partial_: true, reach: 8}"
    train(
        folder, "trainer.max_steps=3", f"+model.attention.mine={attention}", "model.layout=[mine]",
        PYTHONPATH=str(packages),
    )  # fmt: skip
    return folder, packages


def test_an_attention_of_the_users_own_is_evaluated_when_its_package_is_trusted(own):
    folder, packages = own
    refused = run("eval.py", *of_run(folder), "limit=500", PYTHONPATH=str(packages))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the saved configuration was refused: ")
    assert refused.stderr.count("\n") == 1
    for word in ("'mypackage.Mine'", "trust=[PACKAGE]"):
        assert word in refused.stderr
    arguments = [*of_run(folder), "limit=500", "trust=[mypackage]"]
    result = run("eval.py", *arguments, PYTHONPATH=str(packages))
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "evaluation.json").read_text())["bytes_scored"] == 500
    missing = run("eval.py", *arguments)  # where the package is not found
    assert missing.returncode == 2
    assert "trust names 'mypackage', which cannot be imported" in missing.stderr


@pytest.mark.parametrize(
    "target", ["mypackage.attention.function", "mypackage.attention.PatternAttention", "os.system"]
)
def test_trust_is_in_the_classes_that_the_package_defines(own, target, monkeypatch):
    folder, packages = own
    monkeypatch.syspath_prepend(packages)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["attention"]["mine"]["_target_"] = target
    with pytest.raises(ValueError, match=f"refused: .*{target}"):
        rebuild(yaml.safe_dump(config), "model", trust=["mypackage"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trust=mypackage"], ["trust must be a list of names, got 'mypackage'"]),
        (["split=tset"], ["train, validation, test", "tset"]),
        (["context=64", "stride=65"], ["stride=65", "context=64"]),
        (["limit=0"], ["limit", "0"]),
        (["data.path=/no/such"], ["/no/such"]),
        (["precision=fp8", "limit=10"], ["fp8"]),
        (["context=abc"], ["context", "whole number", "'abc'"]),
        (["device=gpu"], ["device", "'gpu'"]),
        (["device=mps"], ["device", "'mps'"]),
        (["temperature=nan", "prompt=x"], ["temperature=nan"]),
        (["device=cuda", "limit=10"], ["device=cpu"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_sentence(folder, arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # device=cuda is a mistake
    with pytest.raises(SystemExit) as leaving:
        main(composed(*of_run(folder), *arguments, name="eval"))
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message
