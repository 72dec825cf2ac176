"""The experiments that `bench.experiments` trains beside their dense twins."""

from argparse import Namespace
from pathlib import Path

import pytest

from bench.experiments import overrides
from tests.support.configs import CONF, composed

PAPERS = ("sparse_transformer", "longformer", "bigbird")
NAMES = [p.stem for p in sorted((CONF / "experiment").glob("*.yaml")) if p.stem.startswith(PAPERS)]


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_differs_in_attention_alone_and_both_have_the_published_length(name):
    options = Namespace(minutes=3, out=Path("out"), overrides=["data.workers=0"])
    own, twin = (composed(*overrides(name, dense, options)) for dense in (False, True))
    published = composed(f"experiment={name}")
    longest = published.phases[-1].data.length if published.phases else published.data.length
    assert own.data == twin.data
    assert (own.data.length, own.data.workers) == (longest, 0)
    assert own.data.batch_tokens == own.data.micro_tokens
    assert set(twin.model.layout) == {"dense"}
    assert {**own.model, "layout": 0, "attention": 0} == {**twin.model, "layout": 0, "attention": 0}
    if published.phases:
        windows = published.phases[-1].model.attention.longformer.window
        assert own.model.attention.longformer.window == windows
