"""Signals: the run is saved at the end of the step it is in, left, and can be continued."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest

from tests.support.tiny import TinyData, fit
from training.callbacks.checkpoints import Checkpoints
from training.callbacks.interruption import Interruption
from training.run.checkpoint import read_checkpoint

# A run that a test can talk to: data by worker processes, slow steps, and a word when they begin.
SCRIPT = """
import sys, time
from functools import partial
import lightning as L
from data.corpora.byte_file import ByteFile
from data.module import SequenceData
from tests.support.tiny import LENGTH, VOCAB, Recorder, tiny_task, tiny_trainer
from training.callbacks.checkpoints import Checkpoints
from training.callbacks.interruption import Interruption

class Letters(ByteFile):
    vocab_size, units = VOCAB, (1,) * VOCAB

class Slow(L.Callback):
    def on_train_batch_start(self, trainer, task, batch, index):
        print(f"batch {index}", flush=True)
        time.sleep(0.2)

if __name__ == "__main__":
    output, devices = sys.argv[1], int(sys.argv[2])
    data = SequenceData(
        partial(Letters, fractions=[0.8, 0.1, 0.1]), name="text", path=output + "/text",
        cache=output, length=LENGTH, batch_tokens=8 * LENGTH, micro_tokens=2 * LENGTH,
        validation_tokens=None, vocab_size=VOCAB, documents="stream", workers=2, seed=0)
    interruption = Interruption()
    trainer = tiny_trainer(
        output, Recorder(), callbacks=[Slow(), interruption, Checkpoints(output, 1000)],
        max_steps=100, devices=devices, strategy="ddp" if devices > 1 else "auto")
    trainer.fit(tiny_task(), datamodule=data)
    if interruption.signal_received:
        sys.exit(128 + interruption.signal_received)
"""


@pytest.fixture
def output(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "text").write_bytes(bytes(range(16)) * 500)
    return tmp_path


@pytest.fixture
def start(output):
    """Start the script in a process group of its own and wait until it trains."""
    processes = []

    def start(devices=1, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(output), str(devices)],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=(output / "stderr").open("a"),
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_for_training(process, output):
    while "batch 1" not in process.stdout.readline():
        assert process.poll() is None, (output / "stderr").read_text()


def last(output):
    return read_checkpoint(output / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_group_saves_the_step_and_tells_in_the_exit_status(
    number, start, output
):
    process = start()
    wait_for_training(process, output)
    os.killpg(process.pid, number)  # as a terminal's Ctrl-C or `timeout` does, workers included
    assert process.wait(30) == 128 + number, (output / "stderr").read_text()
    assert "Traceback" not in (output / "stderr").read_text()
    assert last(output)["global_step"] == 1


@pytest.mark.slow
def test_a_signal_to_one_process_of_two_stops_both(start, output):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [start(2, LOCAL_RANK=str(rank), MASTER_PORT=port) for rank in range(2)]
    wait_for_training(ranks[1], output)
    ranks[1].send_signal(signal.SIGTERM)
    assert [rank.wait(30) for rank in ranks] == [128 + signal.SIGTERM] * 2
    assert last(output)["global_step"] == 1


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(start, output):
    process = start()
    wait_for_training(process, output)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 1
    assert not (output / "checkpoints").exists()


class Signal(L.Callback):
    """Sends this process a signal during one micro-batch."""

    def __init__(self, at, number=signal.SIGTERM):
        self.at, self.number = at, number

    def on_train_batch_start(self, trainer, task, batch, index):
        if index == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("at", [2, 3])
def test_an_interrupted_step_is_finished_first_and_the_run_continues_after_it(output, at):
    interruption = Interruption()
    callbacks = [Signal(at), interruption, Checkpoints(output, 100)]
    fit(output, data=TinyData(2), callbacks=callbacks)
    assert interruption.signal_received == signal.SIGTERM
    assert last(output)["global_step"] == 2
    path = output / "checkpoints" / "last.ckpt"
    callbacks = [Signal(None), Interruption(), Checkpoints(output, 100)]
    _, rest = fit(output, data=TinyData(2), callbacks=callbacks, resume=path)
    assert list(rest.curve("train/loss_nats")) == [3, 4, 5, 6]


def test_a_signal_during_the_validation_before_training_is_not_lost(output):
    class Early(Signal):
        def on_validation_batch_start(self, *_):
            os.kill(os.getpid(), self.number)

    interruption = Interruption()
    fit(output, callbacks=[Early(None), interruption, Checkpoints(output, 100)])
    assert last(output)["global_step"] == 1
    assert interruption.signal_received == signal.SIGTERM


def test_handlers_are_as_before_when_training_is_over(output):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    fit(output, callbacks=[Interruption()], max_steps=1)
    assert {n: signal.getsignal(n) for n in before} == before
