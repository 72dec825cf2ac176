"""The attention kernels compile for the cards that we do not have here: `python -m bench.aot`.

In processes of their own, because the tests' Triton may be the interpreter.
"""

import re
import subprocess
import sys

import pytest

from tests.support.commands import ROOT, environment

LINE = re.compile(
    r"(?P<verdict>\S+) +sm_(?P<target>\d+) +(?P<path>\w+) +(?P<dtype>\w+) +D=(?P<size>\d+) .*?"
    r"(?P<kernel>\w+_kernel) +(?P<registers>\d+) registers +(?P<stack>\d+) B stack .*?"
    r"(?P<shared>[\d,]+) B shared (?P<digest>\w+)"
)
pytestmark = pytest.mark.slow

SHARED_LIMIT = {"80": 166_912, "90": 232_448}  # bytes of a program: A100; H100 and H200


def compile_ahead(*arguments: str) -> tuple[list[dict[str, str]], str]:
    result = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--processes", "1", *arguments], cwd=ROOT,
        env=environment(), capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [match.groupdict() for match in map(LINE.match, result.stdout.splitlines()) if match]
    return rows, result.stdout


@pytest.mark.parametrize("target", ["80", "90"])
def test_what_ships_compiles(target):
    # float16 ships what bfloat16 does, and heads of 16 and 32 what 64 does; `python -m bench.aot
    # --shipped` compiles those as well, in twice the time.
    sizes = ("--head-size", "64", "--head-size", "128", "--head-size", "256")
    dtypes = ("--dtype", "bfloat16", "--dtype", "float32")
    rows, text = compile_ahead("--shipped", "--target", target, *dtypes, *sizes)
    assert {row["verdict"] for row in rows} == {"ok"}
    assert f"{len(rows)} kernels compiled" in text, text
    assert "0 have no room, 0 failed" in text
    for row in rows:
        assert row["target"] == target
        assert int(row["registers"]) <= 255
        assert int(row["shared"].replace(",", "")) <= SHARED_LIMIT[target]
    kernels = {(row["kernel"], row["dtype"], row["size"]) for row in rows}
    assert kernels >= {
        (f"{kernel}_kernel", dtype, size)
        for kernel in ("forward", "dq", "dkv")
        for dtype in ("bfloat16", "float32")
        for size in ("64", "128")
    }
    assert {row["kernel"] for row in rows} >= {"merge_parts_kernel", "sum_parts_kernel"}
    paths = {"80": {"pointers", "turned"}, "90": {"copies", "turned"}}
    assert {row["path"] for row in rows} >= paths[target]
    variants = int(re.search(r"(\d+) variants", text).group(1))
    assert variants >= 27
    assert len(rows) >= variants


def test_only_the_structure_of_a_pattern_is_compiled():
    patterns = ["causal() & window(8)", "causal() & window(9)"]
    patterns += ["causal() & (window(8) | global_tokens(2))"]
    options = [text for pattern in patterns for text in ("--pattern", pattern)]
    options += ["--target", "90", "--direction", "forward", "--head-size", "64"]
    rows, _ = compile_ahead(*options)
    first, second, other = (row["digest"] for row in rows)
    assert first == second, "another window compiled another kernel"
    assert first != other, "another structure ran the same kernel"


def test_rules_of_one_form_in_one_kernel_are_told_apart():
    """Triton knows a function inside a kernel by its name and the types of its arguments."""
    patterns = ["(causal() & window(8)) | (others() & window(2, block=4))"]
    patterns += ["(causal() & window(8)) | (others() & global_tokens(2))"]
    patterns += ["causal() & window(8) & global_tokens(2)"]  # one inside the other
    options = [text for pattern in patterns for text in ("--pattern", pattern)]
    options += ["--target", "80", "--direction", "forward", "--head-size", "64"]
    rows, _ = compile_ahead(*options)
    digests = [row["digest"] for row in rows if row["kernel"] == "forward_kernel"]
    assert len(digests) == len({*digests}) == 3


HEADS_AND_SWIGLU = """
import sys, torch
import kernels.elementwise.qkv, kernels.elementwise.swiglu
from bench.compiling import compiled_for
with compiled_for(int(sys.argv[1]), copy_engine=False) as found:
    for size, dtype in ((16, torch.bfloat16), (64, torch.bfloat16), (128, torch.float32)):
        qkv, gain, angle = torch.zeros(1, 64, 6 * size), torch.ones(size), torch.ones(64, size // 2)
        out = torch.ops.strider.split_heads(qkv.to(dtype), gain, gain, angle, angle, 2, 2 * size)
        rest = (qkv.to(dtype), gain, gain, angle, angle, 2, 2 * size)
        torch.ops.strider.split_heads_backward(*out, *rest)
    for width, dtype in ((1408, torch.bfloat16), (1408, torch.float32), (7, torch.bfloat16)):
        x = torch.zeros(64, 2 * width, dtype=dtype)
        torch.ops.strider.swiglu_backward(x[:, :width], x)
for kernel in found:
    print(kernel.kernel, kernel.stores, kernel.shared)
"""


@pytest.mark.parametrize("target", ["80", "90"])
def test_the_kernels_of_heads_and_of_swiglu_compile_and_spill_nothing(target):
    result = subprocess.run(
        [sys.executable, "-c", HEADS_AND_SWIGLU, target], cwd=ROOT,
        env=environment(TRITON_INTERPRET="0"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    heads, swiglu = ["split_kernel", "split_backward_kernel"], ["swiglu_backward_kernel"]
    assert [row[0] for row in rows] == 3 * heads + 3 * swiglu
    assert all(int(stores) == 0 for _, stores, _ in rows)
    assert all(int(shared) <= SHARED_LIMIT[target] for _, _, shared in rows)
