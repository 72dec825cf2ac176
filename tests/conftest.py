"""Shared fixtures. Tests run on a GPU where there is one, and on a laptop without."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist runs one process a core
hypothesis.settings.register_profile("strider", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("strider")


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
