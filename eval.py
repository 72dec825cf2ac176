"""Evaluate a trained model:  python eval.py checkpoint=runs/NAME/checkpoints/best.ckpt"""

import json
import re
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from evaluation.generation import generate
from evaluation.report import score, table
from training.checkpoint import model_weights, read_checkpoint, rebuild
from training.errors import UserErrors


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(config: DictConfig) -> None:
    with UserErrors():
        evaluate(config)


def evaluate(config: DictConfig) -> None:
    checkpoint = read_checkpoint(config.checkpoint)
    moved = {"path": config.data.path} if config.data.path else {}
    data = rebuild(checkpoint["config"], "data", cache=config.paths.cache, **moved)
    model = rebuild(checkpoint["config"], "model")
    model.load_state_dict(model_weights(checkpoint))
    model.eval().to(device_of(config))

    data.prepare_data()
    with autocast(config):
        result = score(
            model,
            data.split(config.split),
            context=config.context or data.length,
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
    folder = Path(config.checkpoint).parent.parent
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")

    if config.prompt is not None:
        print("\n" + continuation(model, config, context=config.context or data.length))


def continuation(model: torch.nn.Module, config: DictConfig, context: int) -> str:
    prompt = torch.tensor([list(config.prompt.encode())], dtype=torch.long)
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
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={config.device} needs a GPU and torch sees none; use device=cpu.")
    return torch.device(config.device)


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
    if key != "prompt" or text[:1] in ("'", '"'):
        return argument
    # Inside quotes Hydra unescapes a quote, and backslashes that stand before one.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + m[2].replace("'", "\\'"), text)
    return f"prompt='{escaped}'"


if __name__ == "__main__":
    sys.argv[1:] = map(quoted, sys.argv[1:])
    main()
