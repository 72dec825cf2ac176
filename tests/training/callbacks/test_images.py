"""Images that a model draws: the pixels of a grid, what is completed, when and where it shows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from matplotlib.image import imread
from omegaconf import OmegaConf

import eval as evaluation_script
from data.corpora import Split
from evaluation.images import BORDER, SCALE, complete, draw, to_images, write_grid
from tests.evaluation.test_generation import Counter
from tests.support import wandb_offline
from tests.support.commands import curve, place, run
from tests.support.tiny import VOCAB, TinyData, TinyModel, fit
from training.callbacks import images
from training.callbacks.checkpoints import Checkpoints
from training.callbacks.images import Images

SHAPE = (4, 2, 3)
SIZE = 24


def pixels(path):
    """The grid without its enlargement, ``(H, W, 3)`` uint8."""
    return np.round(imread(path)[::SCALE, ::SCALE, :3] * 255).astype(np.uint8)


def cell(path, row, column, shape=SHAPE):
    """One image of a grid."""
    height, width = shape[0] + 2 * BORDER, shape[1] + 2 * BORDER
    top, left = row * height + BORDER, column * width + BORDER
    return pixels(path)[top : top + shape[0], left : left + shape[1]]


def test_tokens_are_images_in_raster_order_and_back():
    tokens = np.random.default_rng(0).integers(256, size=(5, SIZE))
    images = to_images(torch.from_numpy(tokens), SHAPE)
    assert (images.dtype, images.shape) == (np.uint8, (5, *SHAPE))
    assert images[2, 1, 0].tolist() == tokens[2, 6:9].tolist()
    assert (images.reshape(5, SIZE) == tokens).all()


def test_a_grid_shows_every_pixel_on_white(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(5, *SHAPE), dtype=np.uint8)
    path = write_grid([images[:3], images[3:]], tmp_path / "grid.png")
    for n, image in enumerate(images):
        assert (cell(path, *divmod(n, 3)) == image).all()
    assert (cell(path, 1, 2) == 255).all()
    assert (pixels(path)[0] == 255).all()


def test_images_are_drawn_from_nothing_a_few_in_a_row(tmp_path):
    path = draw(Counter(), 9, SHAPE, tmp_path / "drawn.png", temperature=0)
    expected = (np.arange(SIZE) % Counter.vocab_size).reshape(SHAPE)
    assert (cell(path, 0, 7) == expected).all()
    assert (cell(path, 1, 0) == expected).all()
    assert (cell(path, 1, 1) == 255).all()


@pytest.mark.parametrize(("given", "known"), [(0.0, 0), (0.5, 2), (0.74, 2), (0.99, 3)])
def test_a_completion_keeps_whole_rows_and_continues_them(given, known, tmp_path):
    originals = np.array([[3] * SIZE, [7] * SIZE])
    path = complete(Counter(), originals, SHAPE, given, tmp_path / "c.png", temperature=0)
    for column, value in enumerate((3, 7)):
        original, hidden, drawn = (cell(path, row, column) for row in range(3))
        assert (original == value).all()
        assert (hidden[:known] == value).all()
        assert (hidden[known:] == 128).all()
        assert (drawn[:known] == value).all()
        first = (value + 1) % 10 if known else 0  # from nothing, the counter begins at 0
        new = (first + np.arange(SIZE - known * 6)) % 10
        assert (drawn[known:].ravel() == new).all()


class ImageData(TinyData):
    """Rows of `TinyData`, which claim to be images of 2 x 2 pixels."""

    name, measure, vocabulary, image_shape, length = "tiny", "bits_per_dim", None, (2, 2, 3), 12

    def split(self, name):
        tokens = np.arange(36) % VOCAB
        return Split(tokens, np.arange(0, 36, 12))


def settings(**changes):
    return {
        "samples": 2,
        "completions": 2,
        "given": 0.5,
        "every_validation": False,
        "temperature": 1.0,
        "top_k": None,
        "top_p": 1.0,
    } | changes


def files(output):
    return {path.name for path in (output / "samples").glob("*")}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"step-6.png", "step-6-completions.png"}),
        ({"samples": 0}, {"step-6-completions.png"}),
        ({"samples": None}, {"step-6-completions.png"}),  # on a CPU
        (
            {"every_validation": True, "completions": 0},
            {"step-0.png", "step-3.png", "step-6.png"},
        ),
    ],
)
def test_a_run_draws_at_its_end_or_at_every_validation(changes, expected, tmp_path):
    callback = Images(str(tmp_path), **settings(**changes))
    fit(tmp_path, data=ImageData(), callbacks=[callback], validate_every=3)
    assert files(tmp_path) == expected


def test_the_images_of_a_run_are_the_first_of_validation(tmp_path):
    fit(tmp_path, data=ImageData(), callbacks=[Images(str(tmp_path), **settings())])
    path = tmp_path / "samples" / "step-6-completions.png"
    for n in range(2):
        expected = ((np.arange(12) + 12 * n) % VOCAB).reshape(2, 2, 3)
        assert (cell(path, 0, n, (2, 2, 3)) == expected).all()
        assert (cell(path, 2, n, (2, 2, 3))[0] == expected[0]).all()


def test_images_show_the_weights_that_were_scored_once_these_are_saved(tmp_path, monkeypatch):
    shown, config = [], tmp_path / "config.yaml"
    config.write_text("")

    def look(model, *_, **__):
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        weights = model.state_dict()
        assert all(torch.equal(weights[k.removeprefix("model.")], v) for k, v in saved.items())
        shown.append(model.training)

    monkeypatch.setattr(images, "draw", look)
    callbacks = [
        EMAWeightAveraging(decay=0.9),
        Checkpoints(str(tmp_path), every_steps=100),
        Images(str(tmp_path), **settings(completions=0)),
    ]
    trainer, _ = fit(tmp_path, data=ImageData(), callbacks=callbacks)
    assert shown == [False]
    assert trainer.lightning_module.model.training


def test_text_is_not_drawn_and_drawing_changes_nothing_in_training(tmp_path):
    text, pictures = tmp_path / "text", tmp_path / "pictures"
    fit(text, callbacks=[Images(str(text), **settings())])
    assert not files(text)
    draws = Images(str(pictures), **settings(every_validation=True))
    _, with_images = fit(pictures, data=ImageData(), callbacks=[draws], validate_every=2)
    _, without = fit(tmp_path, data=ImageData(), validate_every=2)
    assert with_images.curve("train/loss_nats") == without.curve("train/loss_nats")
    assert with_images.curve("val/bits_per_dim") == without.curve("val/bits_per_dim")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": -1}, "samples=-1 and completions=2"),
        ({"given": 1.0}, "below 1, got given=1.0"),
        ({"top_p": 0.0}, "top_k=None and top_p=0.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_training(changes, words):
    with pytest.raises(ValueError, match=words):
        Images("unused", **settings(**changes))


def test_an_evaluation_draws_and_completes_images_of_its_split(tmp_path):
    config = OmegaConf.create(
        {"split": "test", "images": 2, "given": 0.5, "temperature": 1.0, "top_k": None,
         "top_p": 1.0, "seed": 1, "device": "cpu", "precision": None}
    )  # fmt: skip
    evaluation_script.draw_images(TinyModel(), ImageData(), config, tmp_path)
    assert (cell(tmp_path / "completions.png", 0, 1, (2, 2, 3))[0, 0] == [12, 13, 14]).all()
    assert cell(tmp_path / "samples.png", 0, 1, (2, 2, 3)).max() < VOCAB
    text = SimpleNamespace(image_shape=None, name="enwik8")
    with pytest.raises(ValueError, match="images=N is for models of images, and enwik8 is none"):
        evaluation_script.draw_images(TinyModel(), text, config, tmp_path)


@pytest.mark.slow
def test_the_quick_start_of_images_trains_shows_and_evaluates(tmp_path):
    folder = tmp_path / "run"
    small = ["model.dim=32", "model.layers=1", "data.workers=0", "callbacks.images.completions=1"]
    result = run(
        "train.py", "experiment=quickstart_cifar10", "logger=wandb", "logger.offline=true",
        "trainer=cpu", "trainer.max_steps=4", *small, *place(folder),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    bits = [m["val/bits_per_dim"] for m in curve(folder).values() if "val/bits_per_dim" in m]
    assert bits[0] == pytest.approx(8, abs=1e-6)
    assert bits[-1] < 8
    drawn = imread(folder / "samples" / "step-4-completions.png")
    (offline,) = wandb_offline.runs(folder)
    shown = next(r["completions"] for r in wandb_offline.history(offline) if "completions" in r)
    assert (imread(wandb_offline.media(offline, shown)) == drawn).all()

    result = run("eval.py", f"checkpoint={folder / 'checkpoints' / 'best.ckpt'}", place(folder)[1])
    assert result.returncode == 0, result.stderr
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved["dims_scored"] == saved["tokens_in_split"] == 8 * 3072
    assert saved["bits_per_dim"] == pytest.approx(bits[-1], abs=0.5)
    assert "bits per dim " in result.stdout
    assert "stride" not in saved  # an image is one window, which does not move
