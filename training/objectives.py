"""What a model is trained to predict: functions from a batch to (nats summed, tokens scored)."""

from torch import Tensor, nn


def next_token(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every token given the tokens before it.

    Args:
        model: has ``vocab_size`` (the start id) and ``loss(inputs, targets) -> (nats, count)``.
        batch: int64 ``(B, L + 1)``; column 0 is the token before the first target. A target that is
            padding (-1) or the start id of another document is not scored.

    Returns:
        Nats summed over the scored tokens (float scalar), and how many they are (int64 scalar).
    """
    targets = batch[:, 1:].masked_fill(batch[:, 1:] == model.vocab_size, -1)
    # Padding is an input too, one column later; as an input it may be any token.
    return model.loss(batch[:, :-1].clamp(min=0), targets)
