"""Shared fixtures. Tests run on a GPU where there is one, and on a laptop without."""

import os

import torch

# Read when triton is first imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest

torch.set_num_threads(1)  # pytest-xdist runs one process a core
hypothesis.settings.register_profile("strider", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("strider")


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def kernel_device() -> torch.device:
    """Where Triton kernels run: compiled on a GPU, or interpreted on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
