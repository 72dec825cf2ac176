"""Attentions that are a text in a yaml: they equal the classes, and mistakes are one sentence."""

import pytest
import torch
from hydra.utils import instantiate

from kernels.patterns import causal, parse, random_blocks, window
from tests.support.configs import SMALL, composed
from training.config.messages import one_sentence

TEXTS = {
    "bigbird": "causal() & (window(3, block=64) | global_tokens(128) | random_blocks(3, block=64))",
    "longformer": "causal() & window(512)",
    "sparse_transformer": "causal() & per_head(fixed(128, 32), fixed(128, 32, sub_block=1))",
}


def build(name: str, *overrides: str):
    return instantiate(composed(f"model={name}", *SMALL, *overrides).model)


def override(text: str) -> str:
    return f'model.attention.pattern.pattern="{text}"'


@pytest.mark.parametrize("name", TEXTS)
def test_a_pattern_in_yaml_is_bit_for_bit_the_family_that_it_describes(name, device):
    family = build(name)
    for parameter in family.parameters():
        if parameter.dim() == 2:  # some are zero and would hide what they pass
            torch.nn.init.normal_(parameter, std=0.2)
    written = build("pattern", override(TEXTS[name]))
    written.load_state_dict({k: v for k, v in family.state_dict().items() if "extra" not in k})
    tokens = torch.randint(256, (2, 700), device=device)
    results = []
    for model in (family.to(device), written.to(device)):
        nats, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        gradients = torch.autograd.grad(nats, list(model.parameters()))
        results.append([nats, model(tokens), *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_each_layer_draws_its_own_random_blocks():
    text = "causal() & (window(8) | random_blocks(2, block=16, seed=5))"
    model = build("pattern", override(text), "model.layers=3")
    for layer, block in enumerate(model.blocks):
        drawn = random_blocks(2, block=16, seed=5, layer=layer)
        assert block.attention.pattern == causal() & (window(8) | drawn)


def test_a_hybrid_is_a_layout():
    model = build("hybrid", "model.layers=8")
    near, every = parse("causal() & window(512)"), causal()
    assert [block.attention.pattern for block in model.blocks] == 2 * [near, near, near, every]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("causal() & windw(8)", "there is no term 'windw'"),
        ("causal() & (window(8)", "'(' was never closed"),
        ("causal() & window(8, blck=2)", "unexpected keyword argument 'blck'"),
        ("causal() & random_blocks(2)", "missing 1 required positional argument: 'block'"),
        ("causal() & window(w)", "w is not a whole number"),
        ("causal() & window(0)", "keys must be at least 1"),
        ("causal() & fixed(16, 4, sub_block=4)", "got fixed(16, 4, sub_block=4)"),
        ("", "invalid syntax"),
    ],
)
def test_a_text_that_is_no_pattern_is_one_sentence_that_names_the_key(text, complaint):
    with pytest.raises(Exception) as error:  # noqa: PT011 (Hydra wraps it)
        build("pattern", override(text))
    sentence = one_sentence(error.value)
    assert sentence.startswith("model.attention.pattern: ")
    assert complaint in sentence


def test_a_value_that_is_no_text_is_refused_too():
    with pytest.raises(Exception, match=r"model\.attention\.window: cannot read the pattern '512'"):
        build("hybrid", "model.attention.window.pattern=512")
