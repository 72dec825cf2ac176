"""The implementations that ours is compared with, each on the same work.

A peer is a function of (case, length, device) that gives ``attention(q, k, v) -> out``. What it
cannot do it raises, as it may at any later point: `bench.kernels` prints the reason and goes on.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.patterns import BIGBIRD_BLOCK, Case, mask_mod
from bench.timing import Attention
from kernels.attend import attend

LONG_MASK = 32_768  # tokens: from here on a block mask made eagerly takes tens of GiB

Peer = Callable[[Case, int, torch.device], Attention]


def ours(case: Case, length: int, device: torch.device) -> Attention:
    return lambda q, k, v: attend(q, k, v, case.pattern, implementation="fused")[0]


def sdpa(backend: SDPBackend) -> Peer:
    """Dense attention of torch: what the pattern saves is measured against it."""

    def peer(case: Case, length: int, device: torch.device) -> Attention:
        def attention(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=case.is_causal)

        return attention

    return peer


def flash4_dense(case: Case, length: int, device: torch.device) -> Attention:
    return _flash4(case.is_causal, (None, None))


def flash4_window(case: Case, length: int, device: torch.device) -> Attention:
    return _flash4(True, (case.window - 1, 0))


def _flash4(causal: bool, window: tuple[int | None, int | None]) -> Attention:
    """FlashAttention-4 in CuTe, dense or with its own window."""
    from flash_attn.cute import flash_attn_func

    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = flash_attn_func(q, k, v, causal=causal, window_size=window)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attention


def flex(case: Case, length: int, device: torch.device, block: int = 128, **options) -> Attention:
    """FlexAttention, compiled for the shapes at hand.

    Args:
        block: tokens of a tile of the block mask.
        options: of torch.compile, or ``kernel_options``.
    """
    kernel_options = options.pop("kernel_options", None)
    torch._dynamo.reset()  # a case is compiled afresh: past a limit, recompiling runs eagerly
    torch._functorch.config.donated_buffer = False  # the graph is kept while backward is timed
    mask = block_mask(case, length, device, block, compiled=length >= LONG_MASK)
    compiled = torch.compile(flex_attention, dynamic=False, **options)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, kernel_options=kernel_options)


def flex_flash(case: Case, length: int, device: torch.device) -> Attention:
    """FlexAttention on the kernels of FlashAttention-4."""
    return flex(case, length, device, kernel_options={"BACKEND": "FLASH"})


def flex_tiles64(case: Case, length: int, device: torch.device) -> Attention:
    """FlexAttention with a mask of BigBird's own blocks, run under ``tiles64_offered``."""
    return flex(case, length, device, BIGBIRD_BLOCK)


def flex_tuned64(case: Case, length: int, device: torch.device) -> Attention:
    """The same through torch's own search, which takes minutes."""
    return flex(case, length, device, BIGBIRD_BLOCK, mode="max-autotune-no-cudagraphs")


def block_mask(case: Case, length: int, device, block: int = 128, compiled=False) -> BlockMask:
    mod = mask_mod(case, length, device)
    return create_block_mask(
        mod, None, None, length, length, device=device, BLOCK_SIZE=block, _compile=compiled
    )


@contextlib.contextmanager
def tiles64_offered() -> Iterator[None]:
    """Offer FlexAttention tiles of 64 x 64: by default it has none for such a mask on Hopper."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.template_heuristics.triton import FlexBwDConfig, FlexConfig

    forward = [FlexConfig(64, 64, 3, 4)]
    backward = [FlexBwDConfig(64, 64, 64, 64, 3, 4)]
    with (
        mock.patch.object(InductorChoices, "get_flex_attention_fwd_configs", return_value=forward),
        mock.patch.object(InductorChoices, "get_flex_attention_bwd_configs", return_value=backward),
    ):
        yield


def dense_peers() -> dict[str, Peer]:
    """Dense attention with the causality of a pattern, whatever else the pattern hides."""
    found = {
        "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    return found | ({} if flash4_is_missing() else {"flash4_dense": flash4_dense})


def sparse_peers(case: Case, slow: bool) -> dict[str, Peer]:
    """What can run the pattern of a case, besides ours.

    Args:
        slow: with torch's own search over tiles, where that is what it takes.
    """
    found: dict[str, Peer] = {} if case.is_dense else {"flex": flex}
    if case.has_random_blocks:
        found |= {"flex_tiles64": flex_tiles64} | ({"flex_tuned64": flex_tuned64} if slow else {})
    if not flash4_is_missing():
        found |= {"flash4_window": flash4_window} if case.window else {}
        found |= {} if case.is_dense else {"flex_flash": flex_flash}
    return found


@functools.cache
def flash4_is_missing() -> str:
    """Why FlashAttention-4 cannot be compared with; empty if it can."""
    try:
        from flash_attn.cute import flash_attn_func  # noqa: F401
    except Exception as error:  # an installation that is broken is missing, too
        return f"{type(error).__name__}: {error}"
    return ""


def surroundings(name: str) -> contextlib.AbstractContextManager:
    """What must hold while a peer compiles and runs."""
    return tiles64_offered() if name == "flex_tiles64" else contextlib.nullcontext()
