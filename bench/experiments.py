"""Experiments for some minutes, beside their dense twins:  python -m bench.experiments NAME ...

A twin is the same experiment with dense attention in every layer. Lengths and windows are the
published ones, those of the last phase where there are several; a step is one forward pass, so that
minutes hold many, and no samples are drawn. Runs share the GPUs that there are, one each at a time.
Prints a table, and writes it, a picture of the curves and the runs' folders to ``--out``. What
follows ``--`` are overrides of all runs, such as the data:

    python -m bench.experiments bigbird_enwik8 --minutes 3 -- data=bytes data.path=FILE
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from hydra import compose, initialize
from omegaconf import DictConfig

from bench.curves import draw_groups, has_curve

COLUMNS = (
    "experiment", "attention", "parameters", "steps", "tokens/s", "TF/s", "MFU", "peak GiB",
    "data wait", "train", "validation",
)  # fmt: skip
DENSE = "models.attention.dense.DenseAttention"


def main() -> int:
    options = _options()
    gpus: queue.Queue[int | None] = queue.Queue()
    for gpu in range(torch.cuda.device_count()) if torch.cuda.is_available() else [None]:
        gpus.put(gpu)
    jobs = [  # composed one after the other: Hydra has one state for all threads
        (name, dense, overrides(name, dense, options)) for name in options.names
        for dense in (False, True)
    ]  # fmt: skip
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        rows = list(pool.map(lambda job: _train(*job, gpus, options), jobs))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    print(table)
    (options.out / "experiments.md").write_text(table + "\n")
    pairs = {
        name: [_folder(name, dense, options) for dense in (False, True)] for name in options.names
    }
    trained = {name: [f for f in pair if has_curve(f)] for name, pair in pairs.items()}
    if groups := {name: folders for name, folders in trained.items() if folders}:
        draw_groups(groups, options.out / "experiments.png")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="files of conf/experiment")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, for each run")
    parser.add_argument("--out", type=Path, default=Path("outputs/experiments"))
    arguments, overrides = sys.argv[1:], []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, overrides = arguments[:cut], arguments[cut + 1 :]
    options = parser.parse_args(arguments)
    options.overrides = overrides
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def _folder(name: str, dense: bool, options) -> Path:
    return options.out / f"{name}-dense" if dense else options.out / name


def overrides(name: str, dense: bool, options) -> list[str]:
    """Of conf/train.yaml, for a short run of an experiment or of its dense twin."""
    more = options.overrides
    config = _composed([f"experiment={name}", *more])
    last = config.phases[-1] if config.phases else {}
    sizes = {**config.data, **last.get("data", {})}
    tokens = min(sizes["micro_tokens"] or sizes["batch_tokens"], sizes["batch_tokens"])
    short = [
        "phases=null", "trainer.max_steps=null", f"trainer.max_minutes={options.minutes}",
        "trainer.validate_every=null", "trainer.log_every=10", "schedule.warmup_steps=200",
        f"paths.output={_folder(name, dense, options)}", "resume=null", "callbacks.samples=null",
        "callbacks.images=null",
    ]  # fmt: skip
    short += [f"data.length={sizes['length']}"] if config.phases else []
    short += _arguments("model", last.get("model", {}))
    short += [f"data.batch_tokens={tokens}", f"data.micro_tokens={tokens}"]
    found = [f"experiment={name}", *short, *more]
    if not dense:
        return found
    model = _composed(found).model
    (attention,) = {key: model.attention[key] for key in model.layout}.values()
    causal = str(not model.embedding.mask).lower()
    twin = f"_target_: {DENSE}, _partial_: true, causal: {causal}"
    if "projections" in attention:
        (key,) = set(model.layout)
        twin += f", projections: '${{model.attention.{key}.projections}}'"
    return [*found, f"+model.attention.dense={{{twin}}}", "model.layout=[dense]"]


def _arguments(key: str, value) -> list[str]:
    """A part of a configuration as overrides."""
    if isinstance(value, DictConfig):
        return [text for name in value for text in _arguments(f"{key}.{name}", value[name])]
    return [f"{key}={value}"] if value != {} else []


def _composed(overrides: list[str]) -> DictConfig:
    with initialize(version_base="1.3", config_path="../conf"):
        return compose("train", overrides=overrides)


def _train(
    name: str, dense: bool, chosen: list[str], gpus: queue.Queue, options: argparse.Namespace
) -> list[str]:
    folder, gpu = _folder(name, dense, options), gpus.get()
    try:
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        command = [sys.executable, "train.py", *chosen]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    finally:
        gpus.put(gpu)
    kind = "dense" if dense else "its own"
    if done.returncode:
        print(done.stderr, file=sys.stderr, flush=True)
        return [name, kind, (done.stderr.strip().splitlines() or ["no message"])[-1]]
    row = [name, kind, *_cells(folder)]
    print(*row, sep=" · ", flush=True)
    return row


def _cells(folder: Path) -> list[str]:
    """What the run has logged: medians of rates, the mean of the last losses."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def logged(key: str) -> list[float]:
        return [row[key] for row in metrics if key in row]

    def middle(key: str) -> float:
        return statistics.median(logged(key) or [float("nan")])

    measure = next(key for row in metrics for key in row if key.startswith("val/bits_per_"))
    training = logged(measure.replace("val/", "train/"))[-5:]
    parameters = next(
        line.split(", ")[-1].split()[0]
        for line in (folder / "train.log").read_text().splitlines()
        if line.endswith(" parameters")
    )
    return [
        parameters, f"{metrics[-1]['step']:,}", f"{middle('tokens_per_second'):,.0f}",
        f"{middle('model_tflops_per_second'):.0f}", f"{middle('mfu'):.1%}",
        f"{max(logged('peak_memory_gib') or [float('nan')]):.1f}",
        f"{statistics.mean(logged('data_wait_share')):.1%}", f"{statistics.mean(training):.3f}",
        f"{logged(measure)[-1]:.3f} {measure.removeprefix('val/')}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
