"""Sampling from a model, one token at a time."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.cache import Cache

_GRAPH_TOKENS = 16  # from which a graph pays: to make it takes as long as a few eager passes


@torch.compiler.set_stance("force_eager")  # lengths change: compiling each costs more than it saves
@torch.inference_mode()
def generate(
    model: nn.Module,
    prompt: Tensor,
    tokens: int,
    *,
    context: int = 1024,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue every prompt by ``tokens`` sampled tokens.

    The prompt takes one forward pass, and each token one over itself and the keys that are kept of
    those before it; on a GPU, the latter is captured as a CUDA graph. Where a sequence outgrows
    ``context``, the model starts again from the last half of it, as it does when a text is scored.

    Args:
        model: a causal model with ``vocab_size`` (the start id, put before the prompt), ``cache``
            and ``next_logits``, see `models.transformer.Transformer`; a pass of one token must not
            wait for the GPU.
        prompt: token ids ``(B, P)`` of one document a row; P may be 0.
        tokens: how many to sample.
        context: tokens that the model looks back at, at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from so many most likely tokens; None: from all.
        top_p: sample from the smallest set of (those) tokens with at least this probability.
        generator: source of randomness, on the CPU.

    Returns:
        ``(B, P + tokens)`` int64, on the device of ``prompt``.

    Raises:
        ValueError: if ``context`` or ``top_k`` is below 1, ``temperature`` negative, ``top_p`` not
            in (0, 1], the prompt holds anything but tokens, or the model is not causal or has no
            positions for so many.
    """
    check_sampling(temperature, top_k, top_p)
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}.")
    if prompt.numel() and not 0 <= prompt.min() <= prompt.max() < model.vocab_size:
        raise ValueError(
            f"a prompt must hold tokens of 0 to {model.vocab_size - 1}, got {int(prompt.min())} to "
            f"{int(prompt.max())}; of several documents, give the last one without its start id."
        )
    device = next(model.parameters()).device
    start = prompt.new_full((len(prompt), 1), model.vocab_size)
    sequence = torch.cat((start, prompt), dim=1).to(device)
    room = 0  # tokens that the cache can still take
    for left in range(tokens, 0, -1):
        if not room:
            half = -(-context // 2)
            unread = sequence if sequence.shape[1] <= context else sequence[:, -half:]
            room = min(context, unread.shape[1] + left - 1)
            cache, read_token = model.cache(room), None
            logits = model.next_logits(unread, cache)
        else:
            cache.advance()
            read_token = read_token or _token_reader(model, cache, unread, room)
            logits = read_token(unread)
        room -= unread.shape[1]
        unread = sample(logits.float().cpu(), temperature, top_k, top_p, generator).to(device)
        sequence = torch.cat((sequence, unread), dim=1)
    return sequence[:, 1:].to(prompt.device)


def _token_reader(
    model: nn.Module, cache: Cache, token: Tensor, count: int
) -> Callable[[Tensor], Tensor]:
    """What gives the logits after each of ``count`` tokens ``(B, 1)``, of which this is the first.

    The cache has advanced to the token.
    """
    if token.is_cuda and count >= _GRAPH_TOKENS:
        return _TokenGraph(model, cache, token)
    return functools.partial(model.next_logits, cache=cache)


class _TokenGraph:
    """``model.next_logits`` of a single token as a CUDA graph: one launch in place of hundreds.

    An eager pass goes before the capture, which can compile, load or set up nothing; the first
    replay writes to the cache what that pass wrote. Weights that autocast has cast and kept were
    cast before the capture, and are kept until the caller leaves its context; all others are cast
    anew by each replay.
    """

    def __init__(self, model: nn.Module, cache: Cache, token: Tensor):
        self.token = token.clone()
        self.graph = torch.cuda.CUDAGraph()
        current, stream = torch.cuda.current_stream(token.device), _side_stream(token.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            model.next_logits(self.token, cache)
        current.wait_stream(stream)
        # Other threads, such as a loader's that pins memory, go on as ever.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = model.next_logits(self.token, cache)

    def __call__(self, token: Tensor) -> Tensor:
        """Logits ``(B, vocab_size)``, which the next call overwrites."""
        self.token.copy_(token)
        self.graph.replay()
        return self.logits


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: the workspace that cuBLAS has for a stream is never given back."""
    return torch.cuda.Stream(device)


def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    """Refuse what no token can be drawn with."""
    if not temperature >= 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
        raise ValueError(
            f"sampling needs temperature >= 0, top_k >= 1 or null, and 0 < top_p <= 1, got "
            f"temperature={temperature}, top_k={top_k} and top_p={top_p}."
        )


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw one token id ``(..., 1)`` from ``logits (..., vocab_size)`` of up to two dimensions.

    Raises:
        FloatingPointError: if a logit is not finite.
    """
    if not logits.isfinite().all():
        raise FloatingPointError(
            "what the model predicts is not finite, and nothing can be drawn from it: its weights "
            "have grown too large; lower `optimizer.lr`, or use an earlier checkpoint."
        )
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probability, order = (logits / temperature).softmax(dim=-1).sort(descending=True)
    if top_k is not None:
        probability[..., top_k:] = 0
        probability /= probability.sum(dim=-1, keepdim=True)
    # Keep each token whose more likely ones do not already reach top_p.
    probability[probability.cumsum(dim=-1) - probability >= top_p] = 0
    return order.gather(-1, torch.multinomial(probability, 1, generator=generator))
