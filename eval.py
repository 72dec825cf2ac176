"""Evaluate a trained model:  python eval.py checkpoint=runs/NAME/checkpoints/best.ckpt"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from evaluation.generation import generate
from evaluation.report import score, table
from training.checkpoint import model_weights, read_checkpoint, rebuild
from training.errors import UserErrors
from training.typecheck import check_arguments


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(config: DictConfig) -> None:
    with UserErrors():
        evaluate(config)


@dataclass(frozen=True)
class Settings:
    """The plain keys of conf/eval.yaml, which says what each means."""

    checkpoint: str
    split: str
    context: int | None
    stride: int | None
    limit: int | None
    batch_tokens: int
    device: str
    precision: str | None
    sample_tokens: int
    temperature: float
    top_p: float
    seed: int


def evaluate(config: DictConfig) -> None:
    check_arguments(Settings, config)
    if config.batch_tokens < 1 or config.sample_tokens < 1:
        raise ValueError(
            f"batch_tokens and sample_tokens must be at least 1, got {config.batch_tokens} and "
            f"{config.sample_tokens}."
        )
    checkpoint = read_checkpoint(config.checkpoint)
    moved = {"path": config.data.path} if config.data.path else {}
    data = rebuild(checkpoint["config"], "data", cache=config.paths.cache, **moved)
    model = rebuild(checkpoint["config"], "model")
    model.load_state_dict(model_weights(checkpoint))
    model.eval().to(device_of(config))

    data.prepare_data()
    tokens = data.split(config.split)
    context = data.length if config.context is None else config.context
    # The sample comes first, so that a mistake in it does not cost a scoring of the split.
    sample = None if config.prompt is None else continuation(model, config, context)
    with autocast(config):
        result = score(
            model,
            tokens,
            context=context,
            stride=config.stride,
            limit=config.limit,
            batch_tokens=config.batch_tokens,
        )
    result = {
        "checkpoint": str(config.checkpoint),
        "step": checkpoint["global_step"],
        "data": data.name,
        "split": config.split,
        **result,
    }
    print(table(result))
    beside = Path(config.checkpoint).parent
    folder = beside.parent if beside.name == "checkpoints" else beside
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")

    if sample is not None:
        print("\n" + sample)


def continuation(model: torch.nn.Module, config: DictConfig, context: int) -> str:
    prompt = torch.tensor([list(str(config.prompt).encode())], dtype=torch.long)
    with autocast(config):
        tokens = generate(
            model,
            prompt,
            config.sample_tokens,
            context=context,
            temperature=config.temperature,
            top_p=config.top_p,
            generator=torch.Generator().manual_seed(config.seed),
        )
    return bytes(tokens[0].tolist()).decode(errors="replace")


def device_of(config: DictConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be auto, cpu, cuda or cuda:N, got {config.device!r}."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={config.device} needs a GPU and torch sees none; use device=cpu.")
    return device


def autocast(config: DictConfig) -> torch.autocast:
    """The precision that was asked for, on the device of the evaluation."""
    device = device_of(config).type
    precision = config.precision or ("bf16-mixed" if device == "cuda" else "32-true")
    if precision not in ("bf16-mixed", "32-true"):
        raise ValueError(f"precision must be 32-true or bf16-mixed, got {precision}.")
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16-mixed")


def quoted(argument: str) -> str:
    """A prompt as Hydra reads any text: what a user types may hold commas and brackets."""
    key, _, text = argument.partition("=")
    if key != "prompt" or text[:1] in ("'", '"') or text == "null":
        return argument
    # Inside quotes Hydra unescapes a quote, and backslashes that stand before one.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + m[2].replace("'", "\\'"), text)
    return "prompt='" + escaped.replace("${", "\\${") + "'"


if __name__ == "__main__":
    sys.argv[1:] = map(quoted, sys.argv[1:])
    main()
