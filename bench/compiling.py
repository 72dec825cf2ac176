"""Compiling the attention kernels for a card that is not there, and what the machine code needs.

The launches of `kernels.attend.launch` run on CPU tensors with a stand-in for the driver: every
kernel is compiled for the arguments that it would be launched with, and not launched.
"""

import contextlib
import hashlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from kernels.attend import descriptors

# Bytes of shared memory that one program may use, by compute capability (A100; H100 and H200).
SHARED_LIMIT = {80: 166_912, 90: 232_448}


class AbsentCard(DriverBase):
    """Stands in for the CUDA driver: names a target, and can launch nothing."""

    def __init__(self, capability: int):
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise RuntimeError("there is no card to time kernels on")

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device: one a target

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One kernel of one target.

    Args:
        registers: of a thread.
        stack: bytes of a thread's local memory.
        stores, loads: instructions that spill to local memory and read it back.
        shared: bytes of shared memory of a program.
        digest: of the machine code.
        seconds: to compile; little if an earlier run has left it in Triton's cache.
    """

    kernel: str
    registers: int
    stack: int
    stores: int
    loads: int
    shared: int
    digest: str
    seconds: float


@contextlib.contextmanager
def compiled_for(capability: int, copy_engine: bool) -> Iterator[list[Compiled]]:
    """Compile what is launched inside the ``with`` block; a kernel met again is listed once.

    Args:
        capability: 80 for sm_80, 90 for sm_90.
        copy_engine: load tiles through descriptors, where their strides allow it.
    """
    found: dict[int, Compiled] = {}

    def launcher(function, grid):
        def compile_only(*arguments, **meta):
            start = time.perf_counter()
            kernel = function.run(*arguments, grid=grid, warmup=True, **meta)
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
            if id(kernel) not in found:
                seconds = time.perf_counter() - start
                found[id(kernel)] = _measure(function.__name__, kernel, seconds)

        return compile_only

    results: list[Compiled] = []
    triton.runtime.driver.set_active(AbsentCard(capability))
    with (
        mock.patch.object(JITFunction, "__getitem__", launcher),
        mock.patch.object(descriptors, "has_copy_engine", return_value=copy_engine),
    ):
        yield results
    results += found.values()


def _measure(name: str, kernel, seconds: float) -> Compiled:
    binary = kernel.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (_dump(option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    stores, loads = (len(re.findall(rf"\b{op}\b", code)) for op in ("STL", "LDL"))
    digest = hashlib.sha256(binary).hexdigest()[:12]
    shared = kernel.metadata.shared
    return Compiled(name, registers, stack, stores, loads, shared, digest, seconds)


def _dump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
