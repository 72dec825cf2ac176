"""Evaluate a trained model:  python eval.py checkpoint=runs/NAME/checkpoints/best.ckpt"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from data.corpora import Split
from data.module import TOKENIZER, SequenceData
from evaluation.generation import generate
from evaluation.images import complete, draw
from evaluation.likelihood import Likelihood
from evaluation.masked import score_masked
from evaluation.positions import draw_positions
from evaluation.report import results, score, table
from training.config.messages import UserErrors
from training.config.validate import check_arguments
from training.run.checkpoint import model_weights, of_phase, read_checkpoint, rebuild


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
    top_k: int | None
    top_p: float
    seed: int
    images: int | None
    given: float
    trust: Sequence[str]


def evaluate(config: DictConfig) -> None:
    check_arguments(Settings, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    if config.batch_tokens < 1 or config.sample_tokens < 1:
        raise ValueError(
            f"batch_tokens and sample_tokens must be at least 1, got {config.batch_tokens} and "
            f"{config.sample_tokens}."
        )
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit must be at least 1 token, got {config.limit}; null scores all.")
    if config.images is not None and config.images < 1:
        raise ValueError(f"images must be at least 1, got {config.images}; null draws none.")
    path = Path(str(config.checkpoint))  # a name such as `16` is read as a number
    checkpoint, folder = read_checkpoint(path), folder_of(path)
    trust = list(config.trust)
    changed = {"cache": config.paths.cache}
    if config.data.path:
        changed["path"] = config.data.path
    if config.data.exclude_rows:
        changed["exclude_rows"] = config.data.exclude_rows
    if (folder / TOKENIZER).exists():  # the one of the training, whatever else is in the cache
        changed["tokenizer"] = str(folder / TOKENIZER)
    data = rebuild(checkpoint["config"], "data", changes=changed, trust=trust)
    if data.masking is not None:
        require_next_token(config)
    length, settings_of_phase = of_phase(checkpoint)
    model = rebuild(checkpoint["config"], "model", changes=settings_of_phase, trust=trust)
    model.load_state_dict(model_weights(checkpoint))
    model.eval().to(device_of(config))

    data.prepare_data()
    split = data.split(config.split)
    scored = split.first(config.limit)
    trained = data.length if length is None else length
    context = trained if config.context is None else config.context
    if data.image_shape is not None and context < data.length:
        raise ValueError(
            f"an image of {data.name} is scored whole, so context must be {data.length} or null, "
            f"got {context}."
        )
    # The sample comes first, so that a mistake in it does not cost a scoring of the split.
    sample = None if config.prompt is None else continuation(model, data, config, context)
    if config.images is not None:
        draw_images(model, data, config, folder)
    with autocast(config):
        sums, settings = score_split(model, data, scored, config, context)
    result = {
        "checkpoint": str(config.checkpoint),
        "step": checkpoint["global_step"],
        "data": data.name,
        "split": config.split,
        **results(
            sums,
            measure=data.measure,
            words=data.words(scored),
            tokens=(len(scored), len(split)),
            documents=(len(scored.starts), len(split.starts)),
            note=split.note,
        ),
        **settings,
    }
    print(table(result))
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_positions(sums, data.measure, folder / "bits_by_position.png")

    if sample is not None:
        print("\n" + sample)


def require_next_token(config: DictConfig) -> None:
    """Refuse what only models of the next token do."""
    for key in ("stride", "prompt", "images"):
        if config[key] is not None:
            raise ValueError(
                f"{key} is for models that predict the next token, and this one predicts masked "
                f"tokens; leave it out."
            )


def score_split(
    model: torch.nn.Module, data: SequenceData, split: Split, config: DictConfig, context: int
) -> tuple[Likelihood, dict[str, Any]]:
    sizes = {"context": context, "batch_tokens": config.batch_tokens}
    if data.masking is not None:
        batches = data.evaluation_batches(split, context)
        return score_masked(model, batches, data.units, tokens=len(split), **sizes)
    return score(model, split.tokens, split.starts, data.units, stride=config.stride, **sizes)


def folder_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote ``checkpoint``."""
    beside = checkpoint.parent
    return beside.parent if beside.name == "checkpoints" else beside


def continuation(
    model: torch.nn.Module, data: SequenceData, config: DictConfig, context: int
) -> str:
    if data.vocabulary is None:
        raise ValueError(f"a prompt is for models of text, and {data.name} is none; leave it out.")
    prompt = data.vocabulary.encode(str(config.prompt)).astype(np.int64)
    with autocast(config):
        tokens = generate(
            model,
            torch.from_numpy(prompt)[None],
            config.sample_tokens,
            context=context,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=torch.Generator().manual_seed(config.seed),
        )
    return data.vocabulary.decode(tokens[0]).decode(errors="replace")


def draw_images(
    model: torch.nn.Module, data: SequenceData, config: DictConfig, folder: Path
) -> None:
    """Write `samples.png`, from nothing, and `completions.png` of the first images of the split."""
    if data.image_shape is None:
        raise ValueError(
            f"images=N is for models of images, and {data.name} is none; leave it out."
        )
    tokens = data.split(config.split).tokens[: config.images * data.length]
    originals = tokens.reshape(-1, data.length)
    sampling = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "generator": torch.Generator().manual_seed(config.seed),
    }
    shape = data.image_shape
    with autocast(config):
        complete(model, originals, shape, config.given, folder / "completions.png", **sampling)
        draw(model, config.images, shape, folder / "samples.png", **sampling)


def device_of(config: DictConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(config.device)):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {config.device!r}.")
    device = torch.device(config.device)
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
