"""Checkpoints of earlier versions, turned into what today's code reads.

A run of commit 480f83e (November 2026) and before kept other module paths in its configuration,
gave the Transformer all settings as keywords of its own, had five keys of its own in each phase,
and had learned positions and global vectors beside the embedding instead of in it. What is already
of today stays as it is.
"""

from typing import Any

from torch import Tensor

# Modules that moved, by the start of their path.
MOVED = {
    "data.byte_file": "data.corpora.byte_file",
    "data.cifar10": "data.corpora.cifar10",
    "data.enwik8": "data.corpora.enwik8",
    "data.hub": "data.corpora.hub",
    "data.pg19": "data.corpora.pg19",
    "data.text": "data.corpora.text",
    "data.text8": "data.corpora.text8",
    "data.masking": "data.batches.masking",
    "training.optimizers": "training.optim.optimizers",
    "training.loggers": "training.run.loggers",
}
# Keywords of the Transformer that are now settings of its parts.
PARTS = {
    "vocab_size": ("embedding", "vocab_size"),
    "masked": ("embedding", "mask"),
    "image_shape": ("embedding", "image_shape"),
    "matrix_shape": ("embedding", "matrix_shape"),
    "global_vectors": ("embedding", "global_vectors"),
    "embedding_dropout": ("embedding", "dropout"),
    "feed_forward": ("block", "feed_forward"),
    "norm": ("block", "norm"),
    "dropout": ("block", "dropout"),
    "tied_head": ("head", "tied"),
}
TARGETS = {
    "embedding": "models.embeddings.Embedding",
    "block": "models.stack.Block",
    "head": "models.heads.Head",
}
IN_EMBEDDING = ("positions.", "global_vectors.")  # parameters that are in there now, after its own


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration in today's form; it need not be trusted, and nothing is built."""
    config = _with_new_paths(config)
    if isinstance(config.get("phases"), list):
        config["phases"] = [_phase(phase, config) for phase in config["phases"]]
    task = config.get("task")
    if isinstance(task, dict) and "model" in task:
        config["task"] = task | {"model": _model(task["model"])}
    if "model" in config:
        config["model"] = _model(config["model"])
    return config


def migrate_weights(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Parameters of a model, by today's names.

    Args:
        weights: name -> tensor.
        prefix: what stands before the names of the model, such as ``"model."``.
    """
    old = any(_is_moved(name, prefix) for name in weights)
    tied = f"{prefix}head.weight" in weights and _is_tied(weights, prefix)
    if not old and not tied:
        return weights
    found = {}
    for name, weight in weights.items():
        if _is_moved(name, prefix):
            name = f"{prefix}embedding.{name.removeprefix(prefix)}"
        if not (tied and name == f"{prefix}head.weight"):
            found[name] = weight
    if tied:  # the head has the embedding, whose parameters have two names
        start = f"{prefix}embedding."
        shared = {name: weight for name, weight in found.items() if name.startswith(start)}
        for name, weight in shared.items():
            found[f"{prefix}head.{name.removeprefix(prefix)}"] = weight
    return found


def migrate_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that training can resume: weights, averages and the optimizer's state."""
    moved = sum(_is_moved(name, "model.") for name in checkpoint.get("state_dict", ()))
    changed = dict(checkpoint)
    for key in ("state_dict", "current_model_state"):  # the averaged and the trained weights
        if key in checkpoint:
            changed[key] = migrate_weights(checkpoint[key], "model.")
    if moved and "optimizer_states" in checkpoint:
        changed["optimizer_states"] = [
            _reordered(state, moved) for state in checkpoint["optimizer_states"]
        ]
    return changed


def _with_new_paths(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_new_paths(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {name: _with_new_paths(value) for name, value in node.items()}
    target = found.get("_target_")
    if isinstance(target, str):
        module, _, name = target.rpartition(".")
        found["_target_"] = f"{MOVED.get(module, module)}.{name}" if module else target
    return found


def _model(model: Any) -> Any:
    """A model's section; those of other classes, and of today, as they are."""
    ours = isinstance(model, dict) and model.get("_target_") == "models.transformer.Transformer"
    if not ours or "embedding" in model or "vocab_size" not in model:
        return model
    parts = {name: {"_target_": path, "_partial_": True} for name, path in TARGETS.items()}
    for key, (part, name) in PARTS.items():
        if key in model:
            parts[part][name] = model[key]
    hidden = model.get("hidden")
    if hidden is not None and isinstance(parts["block"].get("feed_forward"), dict):
        parts["block"]["feed_forward"] = {**parts["block"]["feed_forward"], "hidden": hidden}
    if "norm" in model:
        parts["head"]["norm"] = model["norm"]
    if parts["embedding"].get("dropout") is None:
        parts["embedding"]["dropout"] = model.get("dropout", 0.0)
    gone = {*PARTS, "hidden", "recompute", "documents"}  # documents come in the batch
    kept = {key: value for key, value in model.items() if key not in gone}
    return {**kept, "stack": "recompute" if model.get("recompute") else "plain", **parts}


def _phase(phase: Any, config: dict[str, Any]) -> Any:
    """A phase as changes of the configuration, where it had keys of its own."""
    old = ("length", "batch_tokens", "micro_tokens", "lr", "windows")
    if not isinstance(phase, dict) or not any(key in phase for key in old):
        return phase
    found = {key: value for key, value in phase.items() if key not in old}
    if data := {key: phase[key] for key in old[:3] if key in phase}:
        found["data"] = data
    if "lr" in phase:
        found["optimizer"] = {"lr": phase["lr"]}
        rates = config.get("optimizer")
        if isinstance(rates, dict) and "adamw_lr" in rates:  # all rates were scaled
            share = float(phase["lr"]) / float(rates["lr"])
            found["optimizer"]["adamw_lr"] = share * float(rates["adamw_lr"])
    if phase.get("windows") is not None:
        found["model"] = {"attention": {"longformer": {"window": phase["windows"]}}}
    return found


def _is_moved(name: str, prefix: str) -> bool:
    return name.startswith(tuple(prefix + start for start in IN_EMBEDDING))


def _is_tied(weights: dict[str, Tensor], prefix: str) -> bool:
    """Whether the head of an old model had the embedding's weight: with its rows of no output."""
    return weights[f"{prefix}head.weight"].shape == weights[f"{prefix}embedding.weight"].shape


def _reordered(state: dict[str, Any], moved: int) -> dict[str, Any]:
    """An optimizer's state whose last group had ``moved`` parameters of the embedding at its end.

    They follow the embedding's own weight now, which is the first of that group. The state is kept
    by number: the parameters of all groups are counted from 0.
    """
    group = state["param_groups"][-1]["params"]
    first, rest = group[0], group[1:]
    order = [first, *rest[len(rest) - moved :], *rest[: len(rest) - moved]]
    new_number = dict(zip(order, group, strict=True))
    numbered = {new_number.get(n, n): value for n, value in state["state"].items()}
    return {**state, "state": dict(sorted(numbered.items()))}
