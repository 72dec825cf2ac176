"""Sampling from a model, one token at a time."""

import torch
from torch import Tensor, nn

PADDING = 128  # tokens: lengths are rounded up to a multiple, so that few differ


@torch.compiler.set_stance("force_eager")  # lengths change: compiling each costs more than it saves
@torch.inference_mode()
def generate(
    model: nn.Module,
    prompt: Tensor,
    tokens: int,
    *,
    context: int = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue every prompt by ``tokens`` sampled tokens; computes the context anew at each step.

    Args:
        model: a causal model with ``vocab_size`` (the start id, put before the prompt).
        prompt: token ids ``(B, P)``; P may be 0.
        tokens: how many to sample.
        context: tokens that the model looks back at, at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens with at least this probability.
        generator: source of randomness, on the CPU.

    Returns:
        ``(B, P + tokens)`` int64, on the device of ``prompt``.

    Raises:
        ValueError: if ``temperature`` is negative or ``top_p`` is not in (0, 1].
    """
    check_sampling(temperature, top_p)
    device = next(model.parameters()).device
    start = prompt.new_full((len(prompt), 1), model.vocab_size)
    sequence = torch.cat((start, prompt), dim=1).to(device)
    for _ in range(tokens):
        inputs = sequence[:, -context:]
        length = inputs.shape[1]
        # No token sees the padding after it: the model is causal. It may know no place beyond.
        padded = min(-(-length // PADDING) * PADDING, context)
        inputs = torch.nn.functional.pad(inputs, (0, padded - length))
        logits = model(inputs)[:, length - 1].float().cpu()
        token = sample(logits, temperature, top_p, generator)
        sequence = torch.cat((sequence, token.to(device)), dim=1)
    return sequence[:, 1:].to(prompt.device)


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse what no token can be drawn with."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"sampling needs temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}."
        )


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Draw one token id ``(..., 1)`` from ``logits (..., vocab_size)`` of up to two dimensions."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probability, order = (logits / temperature).softmax(dim=-1).sort(descending=True)
    # Keep each token whose more likely ones do not already reach top_p.
    probability[probability.cumsum(dim=-1) - probability >= top_p] = 0
    return order.gather(-1, torch.multinomial(probability, 1, generator=generator))
