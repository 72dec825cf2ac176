"""Settings of the kernels: what ships is whole, what is forced runs, what is tuned is kept."""

import itertools
import json

import pytest
import torch

from kernels.attend import setup, tuning
from kernels.attend.call import Call
from kernels.attend.tuning import Config, candidates
from kernels.patterns import causal, window
from tests.kernels.attend.test_attend import inputs


def test_a_card_that_ships_has_every_kernel():
    assert {"NVIDIA H200", "NVIDIA H100 80GB HBM3"} <= set(tuning.shipped())
    for card in tuning.shipped().values():
        for dtype, size in itertools.product(("bfloat16", "float16", "float32"), tuning.HEAD_SIZES):
            for rows, direction in itertools.product(tuning.ROWS, tuning.DIRECTIONS):
                shipped = Config(*card[dtype][str(size)][rows][direction])
                assert shipped in candidates(direction, size, getattr(torch, dtype))


def test_another_card_tries_what_is_best_on_those_that_ship():
    for direction, size in itertools.product(tuning.DIRECTIONS, tuning.HEAD_SIZES):
        tried = tuning.likely(direction, size, torch.bfloat16)
        assert tried[0] == candidates(direction, size, torch.bfloat16)[0]
        for rows in tuning.ROWS:
            best = tuning.shipped()["NVIDIA H200"]["bfloat16"][str(size)][rows][direction]
            assert Config(*best) in tried
        assert len(tried) == len(set(tried)) <= 3  # seconds, not minutes


@pytest.mark.parametrize("direction", tuning.DIRECTIONS)
def test_what_is_forced_runs_and_nothing_that_was_prepared_before(direction, kernel_device):
    q, k, v = inputs(L=100, device=kernel_device)
    call = Call(causal() & window(9), 0.25, q.dtype)
    ((part,),) = setup.chains_of(call.pattern, q.shape[1], 100, 100, False)
    for config in (Config(16, 32, 4, 1), Config(32, 16, 4, 2), Config(16, 32, 4, 1)):
        with tuning.forced(**{direction: config}):
            assert setup.setup_of(part, direction, q, k, v, call).config == config


def test_what_was_tuned_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("STRIDER_CACHE", str(tmp_path / "not" / "yet"))
    found = {rows: dict.fromkeys(tuning.DIRECTIONS, Config(64, 32, 4, 2)) for rows in tuning.ROWS}
    tuning._remember("A New Card", "bfloat16", "64", found)
    tuning.tuned.cache_clear()  # as in another process
    assert tuning.tuned("A New Card")["bfloat16"]["64"]["long"]["dkv"] == [64, 32, 4, 2]
    assert [file.suffix for file in (tmp_path / "not" / "yet").iterdir()] == [".json"]
    tuning.tuned.cache_clear()


def test_what_an_older_version_tuned_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("STRIDER_CACHE", str(tmp_path))
    configs = {direction: [64, 32, 4, 2] for direction in ("forward", "queries", "keys")}
    old = {"short": configs, "long": configs}
    tuning._cache_file("An Old Card").write_text(json.dumps({"bfloat16": {"64": old}}))
    tuning.tuned.cache_clear()
    assert "64" not in tuning.tuned("An Old Card").get("bfloat16", {})
    tuning.tuned.cache_clear()


def test_a_tile_is_no_longer_than_the_sequence():
    assert Config(64, 128, 4, 2).fit(40, 3) == Config(64, 16, 4, 2)
    assert Config(64, 128, 4, 2).fit(33, 1000) == Config(64, 128, 4, 2)
