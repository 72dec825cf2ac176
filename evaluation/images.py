"""Images that a model draws, as PNG files: from nothing, or continued from their first rows."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imsave
from torch import Tensor, nn

from evaluation.generation import generate

COLUMNS = 8  # images side by side
BORDER, SCALE = 1, 4  # pixels around an image; size of each pixel in the file
WHITE, UNKNOWN = 255, 128


def to_images(tokens: np.ndarray | Tensor, shape: Sequence[int]) -> np.ndarray:
    """Token ids ``(N, D)`` in raster order -> ``(N, rows, columns, channels)`` uint8."""
    return np.asarray(tokens, dtype=np.uint8).reshape(-1, *shape)


def draw(
    model: nn.Module, count: int, shape: Sequence[int], path: Path, **sampling: object
) -> Path:
    """Draw ``count`` images from nothing and write them to ``path``.

    Args:
        model: a causal model of images, see `generate`.
        shape: rows, columns and channels (red, green, blue).
        sampling: ``temperature``, ``top_k``, ``top_p`` and ``generator`` of `generate`.
    """
    size = math.prod(shape)
    nothing = torch.empty(count, 0, dtype=torch.long)
    drawn = to_images(generate(model, nothing, size, context=size, **sampling), shape)
    return write_grid([drawn[n : n + COLUMNS] for n in range(0, count, COLUMNS)], path)


def complete(
    model: nn.Module,
    originals: np.ndarray,
    shape: Sequence[int],
    given: float,
    path: Path,
    **sampling: object,
) -> Path:
    """Continue images from their first rows; write originals, what was given, and the results.

    Args:
        model: as in `draw`.
        originals: ``(N, D)`` token ids of whole images.
        shape: rows, columns and channels (red, green, blue).
        given: share of the rows that the model sees, rounded down to whole rows.
        sampling: as in `draw`.

    Raises:
        ValueError: if ``given`` is not in [0, 1).
    """
    check_share(given)
    rows, size = shape[0], math.prod(shape)
    known = math.floor(given * rows) * size // rows
    originals = np.asarray(originals, dtype=np.int64)
    hidden = originals.copy()
    hidden[:, known:] = UNKNOWN
    prompt = torch.from_numpy(originals[:, :known])
    drawn = generate(model, prompt, size - known, context=size, **sampling)
    return write_grid([to_images(images, shape) for images in (originals, hidden, drawn)], path)


def check_share(given: float) -> None:
    """Refuse a share of an image that leaves nothing to draw, or is none."""
    if not 0 <= given < 1:
        raise ValueError(
            f"the share of an image that is given must be at least 0 and below 1, got "
            f"given={given}; 0.5 is the upper half."
        )


def write_grid(rows: Sequence[np.ndarray], path: Path) -> Path:
    """Write rows of images, ``(N, rows, columns, 3)`` uint8 each, to a PNG file, enlarged.

    A row that is shorter than the first one is filled up with white.
    """
    border = (BORDER, BORDER)
    lines = []
    for images in rows:
        missing = (0, len(rows[0]) - len(images))
        framed = np.pad(images, (missing, border, border, (0, 0)), constant_values=WHITE)
        lines.append(np.concatenate(list(framed), axis=1))
    picture = np.concatenate(lines, axis=0)
    imsave(path, picture.repeat(SCALE, axis=0).repeat(SCALE, axis=1))
    return path
