"""Keys and classes that have moved: what an old command line or yaml should say now."""

import re
import sys
from collections.abc import Sequence

EXIT_STATUS = 2

# Keys of the command line (`*` stands for the same part in both), with what to write instead.
KEYS = {
    "model.recompute": "model.stack=recompute (or model.stack=plain for false)",
    "model.dropout": "model.block.dropout",
    "model.norm": "model.block.norm",
    "model.feed_forward": "model.block.feed_forward",
    "model.feed_forward.*": "model.block.feed_forward.*",
    "model.hidden": "model.block.feed_forward.hidden",
    "model.embedding_dropout": "model.embedding.dropout",
    "model.tied_head": "model.head.tied",
    "model.vocab_size": "data.vocab_size",
    "model.masked": "objective=masked_token",
    "model.image_shape": "model.embedding.image_shape",
    "model.matrix_shape": "model.embedding.matrix_shape",
    "model.global_vectors": "model.embedding.global_vectors",
    "model.documents": "data.documents",
    "objective.share": "data.masking.share",
    "task.objective.share": "data.masking.share",
    "phases.*.length": "phases.*.data.length",
    "phases.*.batch_tokens": "phases.*.data.batch_tokens",
    "phases.*.micro_tokens": "phases.*.data.micro_tokens",
    "phases.*.lr": "phases.*.optimizer.lr (and the optimizer's other rates, which do not follow)",
    "phases.*.windows": "phases.*.model.attention.longformer.window",
}

# The keys that a phase had of its own, before it could change any value of the run.
OLD_PHASE_KEYS = {
    "length": "`data: {length: ...}`",
    "batch_tokens": "`data: {batch_tokens: ...}`",
    "micro_tokens": "`data: {micro_tokens: ...}`",
    "lr": "`optimizer: {lr: ...}` (with its other rates, which do not follow)",
    "windows": "`model: {attention: {longformer: {window: [...]}}}`",
}

# Modules that a `_target_` may name, before and after.
MODULES = {
    "data.batching": "data.batches.batching",
    "data.byte_file": "data.corpora.byte_file",
    "data.cifar10": "data.corpora.cifar10",
    "data.corpus": "data.corpora",
    "data.enwik8": "data.corpora.enwik8",
    "data.masking": "data.batches.masking",
    "data.pg19": "data.corpora.pg19",
    "data.text": "data.corpora.text",
    "data.text8": "data.corpora.text8",
    "data.vocabulary": "data.prepare.vocabulary",
    "data.windows": "data.batches.windows",
    "training.loggers": "training.run.loggers",
    "training.muon": "training.optim.muon",
    "training.optimizers": "training.optim.optimizers",
}


def refuse_moved_keys(arguments: Sequence[str]) -> None:
    """Say what to write for the first key of a command line that has moved, and exit."""
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+~")
        if now := moved_key(key):
            print(f"error: {key} has moved; write {now} instead.", file=sys.stderr)
            sys.exit(EXIT_STATUS)


def moved_key(key: str) -> str | None:
    """What to write for a key of the configuration now; None if it has not moved."""
    for old, now in KEYS.items():
        if match := re.fullmatch(re.escape(old).replace(r"\*", "(.+)"), key):
            return now.replace("*", match[1]) if match.groups() else now
    return None


def moved_target(name: str) -> str | None:
    """Where the class or function at an old ``_target_`` is now; None if it has not moved."""
    module, _, target = name.rpartition(".")
    return f"{MODULES[module]}.{target}" if module in MODULES else None
