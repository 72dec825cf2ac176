"""Train a long-sequence model:  python train.py model=bigbird data=enwik8"""

import logging
import sys

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

from training.callbacks.interruption import Interruption
from training.config.messages import UserErrors
from training.config.moved import refuse_moved_keys
from training.config.validate import CONF, check_documents, check_groups, check_types
from training.phases import check_phases, read_phases
from training.run import folder
from training.run.console import show_log

log = logging.getLogger("strider")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    """Train until the budget is spent; returns the last validation's result, for sweeps.

    A run that was finished before, and is only found so, has none: nan.
    """
    show_log()
    with UserErrors() as errors:
        check_groups(config)
        phases = read_phases(config)
        check_types(config)
        check_documents(config)
        checkpoint = folder.choose_checkpoint(config)
        L.seed_everything(config.seed, verbose=False)
        data = instantiate(config.data, _partial_=True)(phases=[p.batching for p in phases])
        task = instantiate(config.task)
        check_phases(phases, task.model)
        callbacks = {name: c for name, c in instantiate(config.callbacks).items() if c is not None}
        trainer = instantiate(config.trainer)(
            output=config.paths.output,
            callbacks=[*callbacks.values(), errors],
            loggers=[],
            phases=phases,
        )
        data.accumulation(trainer.world_size)  # refuses what the devices cannot share
        data.prepare_data()
        # Only now, when all that was asked for is found possible, is anything written.
        folder.open_folder(config, checkpoint)
        if trainer.is_global_zero:
            data.keep_tokenizer(config.paths.output)
        trainer.loggers = instantiate(config.logger)
        try:
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
        except (KeyboardInterrupt, SystemExit):  # a second Ctrl-C, which Lightning exits upon
            leave_if_interrupted(callbacks.get("interruption"))
            raise
    leave_if_interrupted(callbacks.get("interruption"))
    return float(trainer.callback_metrics.get(f"val/{data.measure}", "nan"))


def leave_if_interrupted(interruption: Interruption | None) -> None:
    """Exit as a shell reports a program that a signal ended."""
    if interruption is not None and interruption.signal_received:
        log.info("interrupted; the same command continues this run")
        sys.exit(128 + interruption.signal_received)


def without_null(argument: str) -> str:
    """`experiment=null` as Hydra writes it, which takes no null for a group: `~experiment`."""
    group, _, choice = argument.partition("=")
    return f"~{group}" if choice == "null" and (CONF / group).is_dir() else argument


if __name__ == "__main__":
    refuse_moved_keys(sys.argv[1:])
    sys.argv[1:] = map(without_null, sys.argv[1:])
    main()
