"""Bad memory accesses and races, looked for by NVIDIA's compute-sanitizer where it is installed."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.commands import ROOT, environment

SMALL_CALLS = """
import torch
from kernels.attend import attend
from kernels.patterns import causal, fixed, global_tokens, strided, window
for pattern in (causal() & (window(70) | global_tokens(3)), causal() & (window(8) | strided(8)),
                causal() & fixed(32, 8)):
    for length in (64, 150):
        x = torch.randn(1, length, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        q, k, v = (x.clone().requires_grad_() for _ in range(3))
        out, lse = attend(q, k, v, pattern, implementation="fused")
        (out.float().sum() + lse.sum()).backward()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(
    not (torch.cuda.is_available() and shutil.which("compute-sanitizer")),
    reason="needs a GPU and compute-sanitizer",
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_kernels_access_memory_as_they_should(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    result = subprocess.run(
        [*command, sys.executable, "-c", SMALL_CALLS], cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
