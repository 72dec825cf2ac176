"""What enters the first block: tokens, learned positions and vectors in front; rotary tables."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.common.documents import first_tokens


class RasterPositions(nn.Module):
    """Learned embeddings of each coordinate, added up: where in a raster a token belongs.

    Images are rows, columns and channels; text may be laid out as a matrix of rows and columns.
    Entry ``t`` is the place of token ``t`` of a document, which is the token that input ``t``
    predicts (input 0 is the start id). The released code of the source gives input ``t`` the place
    of the token it holds, and the start none; the two differ by one step along the raster.

    Args:
        dim: width of the model.
        shape: how many there are of each coordinate; the last one runs fastest.

    Raises:
        ValueError: unless ``shape`` is two or more positive numbers.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 5.3 (n_emb = 3 for images,
        2 for text).
    """

    def __init__(self, dim: int, shape: Sequence[int]):
        super().__init__()
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(
                f"learned positions need two or more sizes, such as [32, 32, 3] for images or "
                f"[96, 128] for text, got {list(shape)}; change model.embedding.image_shape or "
                f"matrix_shape (null: no such positions)."
            )
        self.shape = tuple(shape)
        self.coordinates = nn.ModuleList(nn.Embedding(size, dim) for size in shape)

    def draw(self, std: float) -> None:
        """Draw the embeddings, so that their sum has this standard deviation."""
        for embedding in self.coordinates:
            nn.init.normal_(embedding.weight, std=std / len(self.shape) ** 0.5)

    def check_length(self, length: int) -> None:
        """Refuse sequences of more tokens than the raster has.

        Raises:
            ValueError: if it has fewer.
        """
        if length > math.prod(self.shape):
            raise ValueError(
                f"learned positions reach {math.prod(self.shape):,} tokens {self.shape}, got "
                f"{length:,}; shorten the sequence (data.length, context), or train with a larger "
                f"model.embedding.matrix_shape."
            )

    def forward(self, token: Tensor) -> Tensor:
        """Entries of tokens by their number, ``(...)`` integers -> ``(..., dim)``."""
        total = 0
        for size, embedding in zip(reversed(self.shape), reversed(self.coordinates), strict=True):
            total = total + embedding(token % size)
            token = token // size
        return total


class Embedding(nn.Embedding):
    """Tokens, and what is added to them or stands in front of them.

    Its rows are the ``vocab_size`` tokens, the start id (``vocab_size``: an input only, never an
    output) and, if ``mask``, the mask id (``vocab_size + 1``).

    Args:
        dim: width of the model.
        vocab_size: number of different tokens.
        mask: whether there is a mask id, for models that predict masked tokens.
        image_shape: rows, columns and channels of the images that the tokens are: adds a learned
            embedding of each, so documents must begin where an image does; None: no images.
        matrix_shape: rows and columns: adds a learned embedding of each, as if each document were
            written into a matrix; None: no such positions.
        global_vectors: learned vectors in front of the tokens, which are no text and not scored
            (the extra tokens of BigBird-ETC); of several documents of a row, the first has them.
        dropout: probability, on all of it.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        vocab_size: int,
        mask: bool = False,
        image_shape: Sequence[int] | None = None,
        matrix_shape: Sequence[int] | None = None,
        global_vectors: int = 0,
        dropout: float = 0.0,
    ):
        if vocab_size < 1 or global_vectors < 0 or not 0 <= dropout < 1:
            raise ValueError(
                f"an embedding needs a vocab_size of at least 1, 0 or more global vectors and a "
                f"dropout in [0, 1), got model.embedding.vocab_size={vocab_size}, "
                f"model.embedding.global_vectors={global_vectors} and "
                f"model.embedding.dropout={dropout} (model.block.dropout if it is not set)."
            )
        super().__init__(vocab_size + 1 + mask, dim)
        self.vocab_size, self.start_id = vocab_size, vocab_size
        self.mask_id = vocab_size + 1 if mask else None
        shapes = [shape for shape in (image_shape, matrix_shape) if shape is not None]
        self.positions = nn.ModuleList(RasterPositions(dim, shape) for shape in shapes)
        self.global_vectors = nn.Embedding(global_vectors, dim) if global_vectors else None
        self.dropout = nn.Dropout(dropout)

    @property
    def num_global(self) -> int:
        """Vectors in front of the tokens."""
        return 0 if self.global_vectors is None else self.global_vectors.num_embeddings

    def draw(self, std: float) -> None:
        """Draw all of it: tokens, vectors and the sum of each kind of positions."""
        nn.init.normal_(self.weight, std=std)
        for positions in self.positions:
            positions.draw(std)
        if self.global_vectors is not None:
            nn.init.normal_(self.global_vectors.weight, std=std)

    @torch.no_grad()
    def clear_start(self) -> None:
        """Set the start id to zero: it is hardly ever trained, so it begins as "nothing known"."""
        # By a mask, because a row of a weight whose rows are sharded would be a copy.
        number = torch.ones_like(self.weight[:, :1], dtype=torch.int64).cumsum(dim=0)
        self.weight.masked_fill_(number == self.start_id + 1, 0.0)

    def forward(
        self, tokens: Tensor, first: int | Tensor = 0, documents: Tensor | None = None
    ) -> Tensor:
        """Token ids ``(B, L)`` -> ``(B, num_global + L, dim)``.

        Args:
            tokens: ids.
            first: number of the first of them in its sequence, an int or a tensor ().
            documents: number of each token's document ``(B, L)``, non-decreasing: learned positions
                begin with each; None: all tokens of a row are of one.

        Raises:
            ValueError: if there are no positions for so many; not if ``first`` is a tensor, whose
                value only its device knows.
        """
        x = super().forward(tokens)
        if self.positions:
            if not isinstance(first, Tensor):  # no document is longer than its row
                self.check_length(first + tokens.shape[1])
            number = first + torch.arange(tokens.shape[1], device=tokens.device)
            if documents is not None:
                number = number - first_tokens(documents)
            for positions in self.positions:
                x = x + positions(number)
        if self.global_vectors is not None:
            vectors = self.global_vectors.weight.to(x.dtype)
            x = torch.cat((vectors.expand(len(x), -1, -1), x), dim=1)
        return self.dropout(x)

    def check_length(self, length: int) -> None:
        """Refuse sequences that there are no positions for.

        Raises:
            ValueError: if ``length`` is more than the learned positions reach.
        """
        for positions in self.positions:
            positions.check_length(length)


def rotary_tables(positions: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of ``positions (L,)``: two float32 ``(L, head_size / 2)``.

    Source:
        RoFormer, Su et al. 2021, arXiv:2104.09864, eq. 15; wavelengths from 2 pi to 2 pi ``base``.
    """
    pairs = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    angle = positions.float()[:, None] * base ** (-pairs / head_size)
    return angle.cos(), angle.sin()
