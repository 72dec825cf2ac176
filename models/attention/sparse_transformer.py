"""The Sparse Transformer's factorised attention (Child et al. 2019, arXiv:1904.10509)."""

from kernels import patterns
from kernels.patterns import Pattern
from models.attention.pattern import PatternAttention
from models.attention.projections import MakeProjections, Projections

KINDS = ("strided", "fixed")
USES = ("merged", "heads", "layers")


class SparseTransformerAttention(PatternAttention):
    """Two sets of keys through which every earlier token is at most two steps away.

    - ``strided`` (for images, whose rows have one length): the last ``stride`` tokens, and every
      ``stride``-th token before the query.
    - ``fixed`` (for text): the query's own block of ``stride`` tokens, and the summary cells of all
      earlier blocks, ``cells`` at the end of each.

    Args:
        kind: ``"strided"`` or ``"fixed"``.
        stride: the paper's ``l``.
        cells: the paper's ``c``. Fixed kind only.
        use: how the two sets are put together: ``"merged"``: every head sees both (eq. 7);
            ``"heads"``: heads see the one and the other in turn (eq. 8); ``"layers"``: layers do
            (eq. 6).
        distinct_sub_blocks: heads have summary cells of their own, as section 4.3 prefers: those of
            each next head stand ``cells`` before, until a block has no more. Fixed kind only.
        sub_blocks: after how many heads it begins again at the end of the block, the released
            code's ``num_verts``; null: as many as a block has. Fixed kind only.

    Raises:
        ValueError: for another kind or use, or sizes that cannot be.

    Source:
        Sections 4.2 and 4.3. The strided window has ``stride`` tokens with the query's, as in the
        released code; the text has one more.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        kind: str,
        stride: int,
        cells: int = 32,
        use: str = "merged",
        distinct_sub_blocks: bool = True,
        sub_blocks: int | None = None,
        projections: MakeProjections = Projections,
    ):
        if kind not in KINDS or use not in USES:
            raise ValueError(
                f"kind must be one of {', '.join(KINDS)} and use one of {', '.join(USES)}, got "
                f"{kind} and {use}."
            )
        if kind == "strided":
            local, far = patterns.window(stride), [patterns.strided(stride)]
            merged = [local | far[0]]
        else:
            if cells < 1:
                raise ValueError(f"cells must be at least 1, got {cells}.")
            most = max(1, stride // cells) if distinct_sub_blocks else 1
            count = most if sub_blocks is None else sub_blocks
            if not 1 <= count <= most:
                raise ValueError(
                    f"sub_blocks must be from 1 to {most}, with stride={stride}, cells={cells} and "
                    f"distinct_sub_blocks={distinct_sub_blocks}, got {sub_blocks}."
                )
            local = patterns.window(1, block=stride)
            far = [patterns.summary(stride, cells, sub_block=n) for n in range(count)]
            merged = [patterns.fixed(stride, cells, sub_block=n) for n in range(count)]
        pattern = patterns.causal() & _chosen(use, layer, heads, local, far, merged)
        super().__init__(dim, heads, layer, pattern=pattern, projections=projections)


def _chosen(
    use, layer, heads, local: Pattern, far: list[Pattern], merged: list[Pattern]
) -> Pattern:
    if use == "layers":
        return _by_head([local] if layer % 2 == 0 else far, heads)
    if use == "heads":
        return _by_head([p for column in far for p in (local, column)], heads)
    return _by_head(merged, heads)


def _by_head(variants: list[Pattern], heads: int) -> Pattern:
    """Each head has one of the variants, in turn; those for which there is no head are left out."""
    used = variants[:heads]
    return patterns.per_head(*used) if len(used) > 1 else used[0]
