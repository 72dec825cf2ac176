"""BigBird (Zaheer et al. 2020, arXiv:2007.14062): window, global and random blocks."""

from kernels import patterns
from models.attention.pattern import PatternAttention
from models.attention.projections import MakeProjections, Projections


class BigBirdAttention(PatternAttention):
    """Each block of queries sees its neighbours, the first blocks, and some drawn at random.

    Bidirectional (``causal=False``) it is the paper's ITC (section 2, appendix D: block 64, 3
    window, 2 global and 3 random blocks): global blocks see everything and are seen by everything.
    They are the first ones here; Google's code takes the first and the last. In the paper's ETC,
    ``global_tokens`` that the model puts in front of the text (``global_vectors``) take the place
    of global blocks; its relative labels are not built.

    The causal form, which the paper does not define: the window is the query's own block and those
    before it, global blocks are seen but see no later token, and random blocks are drawn among the
    earlier ones. Every head and layer draws its own.

    Blocks begin with each document. The draw of a bidirectional form depends on the number of
    blocks of the row: in a packed row, drawn blocks that lie beyond the document show nothing, and
    it has fewer than alone.

    Args:
        causal: later tokens are hidden.
        block: tokens of a block.
        window_blocks: blocks of the window, the query's own counted; odd if not causal.
        global_blocks: leading blocks of a document that are global; 0 for none.
        global_tokens: leading tokens of a document that are global, in front of the global blocks.
        random_blocks: blocks drawn for each block of queries; 0 for none.
        seed: selects the draw.

    Raises:
        ValueError: if a number cannot be, or a bidirectional window has no middle.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        causal: bool = True,
        block: int = 64,
        window_blocks: int = 3,
        global_blocks: int = 2,
        global_tokens: int = 0,
        random_blocks: int = 3,
        seed: int = 0,
        projections: MakeProjections = Projections,
    ):
        if min(global_blocks, global_tokens, random_blocks) < 0:
            raise ValueError(
                f"global_blocks, global_tokens and random_blocks must be at least 0, got "
                f"{global_blocks}, {global_tokens} and {random_blocks}."
            )
        if causal:
            seen = patterns.window(window_blocks, block=block)
        elif window_blocks % 2:
            side = window_blocks // 2
            seen = patterns.window(side, side, block=block)
        else:
            raise ValueError(
                f"a bidirectional window has the query's block in its middle, so window_blocks "
                f"must be odd, got {window_blocks}."
            )
        if global_tokens or global_blocks:
            seen = seen | patterns.global_tokens(global_tokens + global_blocks * block)
        if random_blocks:
            seen = seen | patterns.random_blocks(random_blocks, block=block, seed=seed)
        pattern = patterns.causal() & seen if causal else seen
        super().__init__(dim, heads, layer, pattern=pattern, projections=projections)
