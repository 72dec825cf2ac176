"""The LightningModule: a model, its objective, and what happens at an optimizer step."""

from collections.abc import Callable

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from data.batches.batch import Batch
from evaluation.measures import MEASURES, word_perplexity
from training.callbacks.phases import Phases
from training.objectives import MaskedToken, NextToken, check_attention
from training.run.progress import Budget

MAX_SKIPPED_IN_A_ROW = 10


class SequenceTask(L.LightningModule):
    """Learns what its objective asks of each batch.

    The loss that is optimised is in nats per token, and the attentions' own terms are added to it;
    ``train/loss_nats`` and the measure of the data
    (``train/bits_per_byte``, say) are means over all scored tokens of an optimizer step, over
    accumulated micro-batches and ranks. ``val/word_perplexity`` is there for data that have
    word-level results.
    A step whose gradient is not finite changes nothing and is counted in ``train/skipped_steps``.
    Between two logged steps nothing is read from the device, so that it never waits for the host,
    if the optimizer takes ``found_inf`` (see `torch.amp.GradScaler`), as ours do on a GPU.

    Args:
        model: has ``loss(inputs, targets, documents) -> (nats, count)``, ``attentions()`` and
            ``losses()``; for masked tokens, a mask id in its ``embedding``.
        objective: says which attention fits, and how many tokens are scored.
        optimizer: makes the optimizer from the model; its learning rates are the peak rates.
        schedule: ``(step, progress) -> factor`` of the peak rates, from the start of each phase.
        seed: what dropout draws depends on this, the step, the micro-batch and the rank alone.

    Raises:
        ValueError: if the model cannot be trained on this objective, or a setting of the optimizer
            or the schedule is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: NextToken | MaskedToken,
        optimizer: Callable[[nn.Module], Optimizer],
        schedule: Callable[[int, float], float],
        seed: int,
    ):
        super().__init__()
        check_attention(objective, model.attentions())
        if not objective.causal and model.embedding.mask_id is None:
            raise ValueError(
                "masked tokens need a model with a mask id, got model.embedding.mask=false; leave "
                "it to objective=masked_token."
            )
        # Wrong settings show here, before anything is written.
        schedule(0, 0.0)
        optimizer(model)
        self.model, self.objective = model, objective
        self._make_optimizer = optimizer
        self._schedule = schedule
        self._seed = seed
        self._micro_batches: list[Tensor] = []  # sums over those of the current step
        self._skipped = torch.zeros(2, dtype=torch.int64)  # steps in all, and in a row until now

    @property
    def budget(self) -> Budget:
        return Budget.of(self.trainer)

    def configure_optimizers(self) -> Optimizer:
        optimizer = self._make_optimizer(self.model)
        strategy = self.trainer.strategy
        # Optimizers may share the work: data parallel processes have the same gradients.
        optimizer.replicated = isinstance(strategy, DDPStrategy) and strategy.world_size > 1
        return optimizer

    def change_settings(
        self, optimizer: Callable[[nn.Module], Optimizer], schedule: Callable[[int, float], float]
    ) -> None:
        """Go on with the settings of this optimizer, which keeps its state, and this schedule."""
        self._make_optimizer, self._schedule = optimizer, schedule
        self._apply_settings()

    def on_fit_start(self) -> None:
        # Unscored targets are -1; they index this extra zero.
        self._units = torch.tensor([*self.trainer.datamodule.units, 0], device=self.device)
        self._skipped = self._skipped.to(self.device)

    # Training

    def on_train_start(self) -> None:
        self._apply_settings()  # after a resume, too, what is configured now counts
        self.budget.clock.start()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._seed_generators()
        nats, count = self.model.loss(batch.inputs, batch.targets, batch.documents)
        self._micro_batches.append(self._sums(nats, count, batch.targets))
        # Not by `count`: each token weighs the same, in whatever micro-batch it is.
        loss = nats / (self.objective.scored_fraction * batch.targets.numel())
        return sum(self.model.losses().values(), start=loss)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        phases = Phases.of(self.trainer)
        factor = self._schedule(*phases.schedule_place(self.trainer))
        for group, rate in zip(optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = rate * factor

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None, *_, **__
    ) -> None:
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        if gradient_clip_val is not None:
            clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self._skip_unless(norm.isfinite(), optimizer)
        step = self.trainer.global_step + 1  # the n-th step is logged at n, as a validation after n
        if step % self.trainer.log_every_n_steps == 0:
            self._log_step(step, norm.item(), optimizer.param_groups[0]["lr"])
        self._micro_batches.clear()

    def on_train_batch_end(self, *_) -> None:
        self.budget.clock.start()

    def _apply_settings(self) -> None:
        """Give the optimizer, once there is one, what is configured for each of its groups."""
        configured = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._make_optimizer(self.model).param_groups
        ]
        self._peak_rates = [settings["lr"] for settings in configured]
        for optimizer in self.trainer.optimizers:
            for group, settings in zip(optimizer.param_groups, configured, strict=True):
                group.update(settings)

    def _seed_generators(self) -> None:
        """Make what is drawn a pure function of the place in the run: there is no state to save."""
        place = (self.trainer.global_step, len(self._micro_batches), self.global_rank)
        seed = int(np.random.SeedSequence((self._seed, *place)).generate_state(1)[0])
        # `torch.manual_seed` would also write down, for each accelerator that is not there, where
        # it was called: half a millisecond a pass.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _skip_unless(self, finite: Tensor, optimizer: Optimizer) -> None:
        """Count this step as skipped unless its gradient is ``finite``, and have it change nothing.

        The gradients are already averaged over ranks, so all ranks decide alike.
        """
        skipped, (in_all, in_a_row) = ~finite, self._skipped
        ended = in_a_row >= MAX_SKIPPED_IN_A_ROW  # stays until it is read
        in_a_row = (in_a_row + 1) * (skipped | ended)
        self._skipped = torch.stack([in_all + skipped, in_a_row])
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # What `torch.amp.GradScaler` tells such an optimizer: whether to step is decided on the
            # device.
            optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
        elif not finite:
            # Optimizers pass over a parameter without a gradient: not even decay or momentum move
            # it.
            self.zero_grad(set_to_none=True)

    def _read_skipped(self, step: int) -> list[int]:
        """Steps skipped in all and in a row; waits for the device.

        Raises:
            FloatingPointError: if too many were skipped in a row.
        """
        in_all, in_a_row = self._skipped.tolist()
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} optimizer steps in a row, "
                f"the last of them step {step} or one shortly before; lower `optimizer.lr` or "
                f"resume from an earlier checkpoint."
            )
        return [in_all, in_a_row]

    def _log_step(self, step: int, norm: float, rate: float) -> None:
        sums = self.trainer.strategy.reduce(sum(self._micro_batches), reduce_op="sum")
        nats, count, units = sums.tolist()
        measure = self.trainer.datamodule.measure
        metrics = {
            "step": float(step),  # Lightning takes it as the x axis
            "train/loss_nats": nats / count,
            f"train/{measure}": MEASURES[measure](nats, int(units)),
            "train/gradient_norm": norm,
            "train/learning_rate": rate,
            "train/skipped_steps": float(self._read_skipped(step)[0]),
        }
        phases = Phases.of(self.trainer)
        if len(phases.phases) > 1:
            metrics["phase"] = float(phases.index + 1)
        self.log_dict(metrics)

    # Validation

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        nats, count = self.model.loss(batch.inputs, batch.targets, batch.documents)
        self._validation += self._sums(nats, count, batch.targets)

    def on_validation_epoch_end(self) -> None:
        nats, _, units = self.trainer.strategy.reduce(self._validation, reduce_op="sum").tolist()
        data = self.trainer.datamodule
        metrics = {
            "step": float(self.trainer.global_step),
            f"val/{data.measure}": MEASURES[data.measure](nats, int(units)),
        }
        if data.validation_words is not None:
            metrics["val/word_perplexity"] = word_perplexity(nats, data.validation_words)
        self.log_dict(metrics)

    def _sums(self, nats: Tensor, count: Tensor, targets: Tensor) -> Tensor:
        """Nats, scored tokens and their units in float64: a sum over many batches loses nothing."""
        units = self._units[targets].sum()
        return torch.stack([nats.detach().double(), count.double(), units.double()])

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["skipped_steps"] = self._read_skipped(self.trainer.global_step)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._skipped = torch.tensor(checkpoint["skipped_steps"])
