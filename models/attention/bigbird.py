"""BigBird (Zaheer et al. 2020, arXiv:2007.14062): window, global and random blocks, causal form."""

from torch import Tensor, nn

from kernels.attend import attend
from kernels.patterns import causal, global_tokens, random_blocks, window
from models.attention import Context
from models.attention.projections import Projections


class BigBirdAttention(nn.Module):
    """Each block of queries sees its neighbours, the first blocks, and some drawn at random.

    The paper's model is bidirectional (section 2, appendix D: block 64, 3 window, 2 global and 3
    random blocks). In this causal form, which the paper does not define, the window is the query's
    own block and the ones before it, the global blocks are seen but see no later token, and random
    blocks are drawn among the earlier ones. Each head and layer draws its own.

    Args:
        block: tokens of a block.
        window_blocks: blocks of the window, the query's own counted.
        global_blocks: leading blocks that every later query sees; 0 for none.
        random_blocks: blocks drawn for each block of queries; 0 for none.
        seed: selects the draw.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        block: int = 64,
        window_blocks: int = 3,
        global_blocks: int = 2,
        random_blocks: int = 3,
        seed: int = 0,
    ):
        super().__init__()
        self.projections = Projections(dim, heads)
        self.pattern = causal() & _seen(
            block, window_blocks, global_blocks, random_blocks, seed, layer
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.projections.split(x, context)
        out, _ = attend(q, k, v, self.pattern, documents=context.documents)
        return self.projections.join(out)


def _seen(block, window_blocks, global_blocks, drawn, seed, layer):
    seen = window(window_blocks, block=block)
    if global_blocks:
        seen = seen | global_tokens(global_blocks * block)
    if drawn:
        seen = seen | random_blocks(drawn, block=block, seed=seed, layer=layer)
    return seen
