"""The gallery: pictures of what patterns show and reach, from the tiles that the kernels visit."""

import sys
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from PIL import Image

from evaluation import gallery
from evaluation.raster import kinds_of_heads, visible_cells
from evaluation.sheet import INK, PANEL, PAPER, SEVERAL, TINTS, shade_kinds
from kernels.patterns import parse
from models.attention.pattern import PatternAttention
from tests.support.configs import MODELS, SMALL, composed


@pytest.mark.parametrize("length", [1, 31, 32, 100])
@pytest.mark.parametrize(
    "text",
    [
        "causal()",
        "causal() & per_head(strided(9), fixed(32, 4), window(7))",
        "causal() & (window(3, block=16) | global_tokens(20) | random_blocks(2, block=16))",
        "window(5, 7) | global_tokens(3) | random_blocks(2, block=7)",
    ],
)
def test_cells_from_the_tiles_are_those_of_the_definition(text, length):
    pattern = parse(text)
    cells = visible_cells(pattern, length, heads=4)
    assert len(cells) == (4 if pattern.differs_by_head else 1)
    for head, seen in enumerate(cells):
        assert torch.equal(seen, pattern.dense(length, head))


def test_colours_tell_which_kinds_of_heads_see_a_key():
    rows = ["xx.x.", "xx.x.", "x.xx.", "x...."]  # of four heads, the first two of one kind
    heads = torch.tensor([[[cell == "x" for cell in row]] for row in rows])
    colours = shade_kinds(kinds_of_heads(heads))[0]
    wanted = [INK, TINTS[0], TINTS[1], SEVERAL, PAPER]
    assert colours.tolist() == [[round(255 * c) for c in to_rgb(colour)] for colour in wanted]


def colours_of(path) -> torch.Tensor:
    """The different colours of a picture, ``(colours, 3)`` from 0 to 1."""
    colours = Image.open(path).convert("RGB").getcolors(maxcolors=2**24)
    return torch.tensor([colour for _, colour in colours]) / 255


def has(colours: torch.Tensor, colour: str) -> bool:
    return bool(((colours - torch.tensor(to_rgb(colour))).abs() < 0.02).all(dim=1).any())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_sheet(name, tmp_path):
    gallery.draw_model(name, 256, tmp_path / "sheet.png")
    assert min(Image.open(tmp_path / "sheet.png").size) > PANEL
    assert has(colours_of(tmp_path / "sheet.png"), INK)


def test_layers_that_differ_have_panels_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(gallery, "draw_sheet", lambda panels, *_, **__: drawn.extend(panels))
    gallery.draw_model("hybrid", 1024, tmp_path)
    assert [panel.name for panel in drawn] == ["window", "dense", "all layers"]
    assert drawn[0].lines == ["layers 1-3, 5-7, 9-11", "causal() & window(512)"]
    assert drawn[0].caption == "384 keys per query, 75 % of dense"
    assert drawn[2].caption == "3 layers reach all"
    drawn.clear()
    gallery.draw_model("bigbird", 256, tmp_path)  # random blocks alone make no layer different
    assert [panel.name for panel in drawn] == ["bigbird", "all layers"]


def test_all_families_fit_a_small_file(tmp_path):
    gallery.draw_families(tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size < 250_000
    colours = colours_of(tmp_path / "gallery.png")
    assert all(has(colours, colour) for colour in (INK, PAPER, SEVERAL, *TINTS[:4]))


def test_a_picture_of_a_very_long_sequence_shows_its_beginning(tmp_path):
    texts = {"a": "causal() & window(9)", "b": "window(9, 9) | global_tokens(8)"}
    attention = {name: partial(PatternAttention, pattern=text) for name, text in texts.items()}
    make = instantiate(composed("model=dense", *SMALL).model, _partial_=True)
    model = make(attention=attention, layout=["a", "b"])
    gallery.draw_layers(model, 2**20, tmp_path / "picture.png")
    assert imread(tmp_path / "picture.png").std() > 0


def test_a_single_token_has_a_picture_too(tmp_path):
    model = instantiate(composed("model=dense", *SMALL).model)
    gallery.draw_layers(model, 1, tmp_path / "picture.png")
    assert imread(tmp_path / "picture.png").std() > 0


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gallery", *map(str, arguments)])
    gallery.main()


def test_the_command_draws_the_models_that_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gallery, "draw_families", lambda path: path.touch())  # another test
    folder = tmp_path / "a" / "b"
    command(monkeypatch, "--models", "dense", "pattern", "--length", 64, "--out", folder)
    assert {path.name for path in folder.iterdir()} == {"gallery.png", "dense.png", "pattern.png"}
    assert capsys.readouterr().out == f"drew gallery.png and 2 models in {folder}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "bigbrd"], "invalid choice: 'bigbrd' (choose from"),
        (["--length", "0"], "--length must be from 1 to 4,096 tokens, got 0"),
        (["--length", "5000"], "--length must be from 1 to 4,096 tokens, got 5000"),
        (["--out", __file__], f"--out must be a folder that can be written, got {__file__} (File"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as leaving:
        command(monkeypatch, *arguments)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
