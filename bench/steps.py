"""Speed of whole training steps on a GPU, model beside model:  python -m bench.steps

Every run is a set of overrides of conf/train.yaml (``"model=bigbird model.dim=768"``) or the peer
``flex_window``: the dense model with FlexAttention's causal window of 512 in place of its
attention. Each is trained for some steps on bundled Wikipedia text, in a process of its own: all
compiled, bfloat16, fused AdamW (or the optimizer of the run or experiment), no logging. Tokens a
second are compared with those of the first run.
"""

import argparse
import json
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.report import versions_line
from data.corpora.byte_file import SAMPLE
from kernels.patterns import causal, window
from models.attention import Context
from models.attention.pattern import PatternAttention
from training.callbacks.compilation import compile_model
from training.callbacks.throughput import PEAK_FLOPS

PEER, PEER_WINDOW = "flex_window", 512
RUNS = ("model=dense", "model=bigbird", "model=longformer", PEER)
COLUMNS = ("run", "length", "step ms", "tokens/s", "ratio", "peak GiB", "TF/s", "MFU")
WARM_UP, STEPS = 6, 20


def main() -> int:
    options = _options()
    if options.child:
        print(json.dumps(measure(options.runs[0], options.lengths[0], options)))
        return 0
    print(versions_line(), flush=True)
    rows = []
    for length in options.lengths:
        first = None
        for run in options.runs:
            row = _in_its_own_process(run, length, options)
            first = first or row.get("tokens_per_second")
            row["ratio"] = row.get("tokens_per_second", 0) / (first or 1)
            rows.append(row)
            print("| " + " | ".join(_cells(row)) + " |", flush=True)
            for line in row.get("profile", []):
                print("    " + line, flush=True)
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(_cells(row)) + " |")
    if options.out:
        options.out.write_text(json.dumps({"versions": versions_line(), "rows": rows}, indent=1))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", default=list(RUNS), help=f"default: {', '.join(RUNS)}")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32_768])
    parser.add_argument("--tokens", type=int, default=65_536, help="of a step")
    parser.add_argument("--common", default="", help="overrides of all runs")
    parser.add_argument("--profile", action="store_true", help="time of the longest kernels")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_its_own_process(run: str, length: int, options) -> dict:
    command = [sys.executable, "-m", "bench.steps", run, "--child", "--lengths", str(length)]
    command += ["--tokens", str(options.tokens), f"--common={options.common}"]
    command += ["--profile"] * options.profile
    # torch's cache of compiled graphs does not tell the backends of its attention apart.
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"run": run, "length": length, "error": error}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(run: str, length: int, options) -> dict:
    """Train for some steps and time them."""
    torch.manual_seed(0)
    model, optimizer = _built(run, length, options)
    batches = _batches(length, options.tokens)
    step = partial(_step, model, optimizer)
    for n in range(WARM_UP):
        step(batches[n % len(batches)])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for n in range(STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(batches[n % len(batches)])
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    milliseconds = statistics.median(start.elapsed_time(end) for start, end in times)
    speed = options.tokens / milliseconds * 1e3
    tflops = model.flops_per_token(length) * speed / 1e12
    name = torch.cuda.get_device_name()
    peaks = [flops for card, flops in PEAK_FLOPS.items() if card in name]
    return {
        "run": run,
        "length": length,
        "milliseconds": milliseconds,
        "tokens_per_second": speed,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "tflops": tflops,
        "mfu": tflops * 1e12 / peaks[0] if peaks else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "profile": _profile(step, batches[0]) if options.profile else [],
    }


def _built(run: str, length: int, options) -> tuple[nn.Module, torch.optim.Optimizer]:
    overrides = [f"data.length={length}", f"data.batch_tokens={options.tokens}"]
    overrides += [*options.common.split(), *("model=dense" if run == PEER else run).split()]
    given = {override.partition("=")[0] for override in overrides}
    if "experiment" not in given:
        defaults = {"data": "sample", "optimizer": "adamw"}
        overrides += [f"{key}={value}" for key, value in defaults.items() if key not in given]
    with initialize(version_base="1.3", config_path="../conf"):
        config = compose("train", overrides=overrides)
    model = instantiate(config.model).cuda()
    for parameter in model.parameters():  # what starts at zero would be timed on zeros
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    if run == PEER:
        _use_flex(model, length)
    compile_model(model)
    return model, instantiate(config.optimizer)(model)


def _batches(length: int, tokens: int) -> list[Tensor]:
    text = np.frombuffer(lzma.decompress(SAMPLE.read_bytes()), dtype=np.uint8)
    random, rows = np.random.default_rng(0), tokens // length
    batches = []
    for _ in range(4):
        firsts = random.integers(len(text) - length, size=rows)
        batch = np.stack([text[first : first + length + 1] for first in firsts])
        batches.append(torch.from_numpy(batch.astype(np.int64)).cuda())
    return batches


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        nats, _ = model.loss(batch[:, :-1], batch[:, 1:])
    (nats / batch[:, 1:].numel()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _profile(step, batch: Tensor) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        step(batch)
        torch.cuda.synchronize()
    kernels = [e for e in recorded.key_averages() if e.self_device_time_total and not e.cpu_time]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    lines = [f"{total / 1e3:.2f} ms in kernels"]
    for event in kernels[:16]:
        milliseconds = event.self_device_time_total / 1e3
        lines.append(f"{milliseconds:8.3f} ms {event.count:4d} x {event.key[:100]}")
    return lines


class _FlexWindow(PatternAttention):
    """FlexAttention's window over the projections of another attention."""

    is_causal = PatternAttention.is_causal
    cache = PatternAttention.cache
    flops_per_token = PatternAttention.flops_per_token
    visible = PatternAttention.visible

    def __init__(self, attention: PatternAttention, mask):
        nn.Module.__init__(self)
        self.projections, self.mask = attention.projections, mask
        self.pattern = causal() & window(PEER_WINDOW)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return flex_attention(q, k, v, block_mask=self.mask)


def _use_flex(model: nn.Module, length: int) -> None:
    def seen(b, h, i, j):
        return (j <= i) & (i - j < PEER_WINDOW)

    mask = create_block_mask(seen, None, None, length, length, device="cuda", _compile=True)
    for block in model.blocks:
        block.attention = _FlexWindow(block.attention, mask)


def _cells(row: dict) -> list[str]:
    if "error" in row:
        return [row["run"], str(row["length"]), row["error"]]
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return [
        row["run"], f"{row['length']:,}", f"{row['milliseconds']:.1f}",
        f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}", f"{row['peak_gib']:.1f}",
        f"{row['tflops']:.0f}", mfu,
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
