"""Train a long-sequence model:  python train.py model=bigbird data=enwik8"""

import sys

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

from training import run_folder
from training.console import show_log
from training.errors import UserErrors


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    """Train until the budget is spent; returns the last validation's bits per byte, for sweeps.

    A run that was finished before, and is only found so, has none: nan.
    """
    show_log()
    with UserErrors() as errors:
        checkpoint = run_folder.prepare(config)
        L.seed_everything(config.seed, verbose=False)
        data, task = instantiate(config.data), instantiate(config.task)
        callbacks = dict(instantiate(config.callbacks))
        trainer = instantiate(config.trainer)(
            output=config.paths.output,
            callbacks=[*callbacks.values(), errors],
            loggers=instantiate(config.logger),
        )
        trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint)

    interruption = callbacks.get("interruption")
    if interruption is not None and interruption.signal_received:
        sys.exit(128 + interruption.signal_received)  # as a shell reports a program so ended
    return float(trainer.callback_metrics.get("val/bits_per_byte", "nan"))


if __name__ == "__main__":
    main()
