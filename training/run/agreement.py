"""Numbers that processes agree on while they train, without waiting for their devices."""

from collections import deque

import lightning as L
import torch


class Largest:
    """The largest of all processes' numbers, of which every process learns in the same call.

    On several GPUs it is that of the call before, and at the first call its own: each reduction has
    a whole step to finish, and no process waits for the work that its device has yet to do.
    """

    def __init__(self) -> None:
        self._asked: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def __call__(self, trainer: L.Trainer, number: float) -> float:
        """All processes must call this, equally often."""
        if trainer.world_size == 1:
            return number
        device = trainer.strategy.root_device
        value = torch.full((), number, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        if device.type != "cuda":
            return value.item()
        answer = torch.empty((), dtype=value.dtype, pin_memory=True)
        answer.copy_(value, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._asked.append((answer, arrived))
        answer, arrived = self._asked[0] if len(self._asked) == 1 else self._asked.popleft()
        arrived.synchronize()
        return answer.item()
