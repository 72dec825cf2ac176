"""What a model is given of each window: inputs, targets, and the document of each token."""

from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.utilities import move_data_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from data.batches.batch import Batch, NextTokenBatches, number_documents
from data.batches.masking import Masking
from data.corpora import Corpus, Split
from data.module import SequenceData
from data.prepare.vocabulary import Bytes
from tests.support.configs import SMALL, composed

START = 256
DOCUMENTS = [b"abcdefghij", b"klm", b"nopqrstuvw", b"xy" * 9]


class Few(Corpus):
    """The same four documents in each split."""

    vocabulary = Bytes()

    def __init__(self, path, cache):
        pass

    def prepare(self):
        pass

    def open(self):
        tokens = np.frombuffer(b"".join(DOCUMENTS), dtype=np.uint8)
        starts = np.cumsum([0, *map(len, DOCUMENTS[:-1])])
        return dict.fromkeys(("train", "validation", "test"), Split(tokens, starts))


def make(documents, masked=False, workers=0):
    masking = Masking(0.3, 0.8, 0.1) if masked else None
    data = SequenceData(
        partial(Few), name="few", path=None, cache="unused", length=8, batch_tokens=24,
        micro_tokens=None, validation_tokens=1000, vocab_size=START, documents=documents,
        workers=workers, seed=1, masking=masking,
    )  # fmt: skip
    data.trainer = SimpleNamespace(
        global_step=0, global_rank=0, world_size=1, accelerator=CPUAccelerator()
    )
    return data


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("documents", ["stream", "pack", "split"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_numbers_documents_where_a_row_may_hold_more_than_one(documents, masked, workers):
    data = make(documents, masked, workers)
    training = list(islice(data.train_dataloader(), 5))
    validation = list(data.val_dataloader())
    assert all(isinstance(batch, Batch) for batch in training + validation)
    # Padding is a document of its own for models that would see it: at the end of each document, or
    # of the text, which only an evaluation reaches.
    in_training = documents == "pack" or (masked and documents == "split")
    in_validation = documents == "pack" or masked
    for batches, numbered in ((training, in_training), (validation, in_validation)):
        for inputs, targets, found in batches:
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.shape == targets.shape == (len(inputs), 8)
            assert (targets < START).all()  # a start id is never predicted
            assert (inputs >= 0).all()
            if not numbered:
                assert found is None
                continue
            assert found.dtype == torch.int32
            begins = found.diff(dim=1, prepend=torch.zeros_like(found[:, :1]))
            assert ((begins == 0) | (begins == 1)).all()
            assert ((begins == 0) | (inputs == START) | (targets < 0)).all()


def test_padding_of_masked_rows_is_seen_by_nobody():
    for inputs, targets, documents in make("split", masked=True).val_dataloader():
        scored = targets >= 0
        seen = documents[:, :, None] == documents[:, None, :]
        padding = inputs == START  # each row is of one document, without its start
        assert padding.any()
        assert not (seen & scored[:, :, None] & padding[:, None, :]).any()


def test_next_token_rows_become_inputs_and_targets():
    rows = torch.tensor([[START, 1, 2, START, 3], [4, 5, -1, -1, -1]])
    inputs, targets, documents = NextTokenBatches(None, START, pack=True).batch(rows)
    assert inputs.tolist() == [[START, 1, 2, START], [4, 5, 0, 0]]
    assert targets.tolist() == [[1, 2, -1, 3], [5, -1, -1, -1]]
    assert documents.tolist() == [[1, 1, 1, 2], [0, 0, 1, 1]]


def test_a_batch_stays_one_when_it_is_moved_to_a_device(device):
    batch = next(iter(make("pack").train_dataloader()))
    moved = move_data_to_device(batch, device)
    assert isinstance(moved, Batch)
    assert {x.device.type for x in moved} == {device.type}
    assert move_data_to_device(Batch(*batch[:2]), device).documents is None
    if device.type == "cuda":
        pinned = pin_memory(batch)
        assert isinstance(pinned, Batch)
        assert all(x.is_pinned() for x in pinned)
        assert pin_memory(Batch(*batch[:2])).documents is None


@pytest.mark.parametrize("model", ["dense", "longformer"])
def test_the_losses_of_packed_documents_are_those_of_each_alone(model, device):
    model = instantiate(composed(f"model={model}", *SMALL, "data.documents=pack").model)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model = model.double().to(device)
    tokens = [torch.randint(256, (n,)) for n in (5, 1, 17, 9)]
    start = torch.tensor([START])

    def nats(*documents):
        row = torch.cat([x for document in documents for x in (start, document)])
        inputs, targets, numbers = NextTokenBatches(None, START, pack=True).batch(row[None])
        found = model.nats(*(x.to(device) for x in (inputs, targets, numbers)))
        return found[targets.to(device) >= 0]

    alone = torch.cat([nats(document) for document in tokens])
    torch.testing.assert_close(nats(*tokens), alone, rtol=1e-5, atol=1e-6)
    mixed = model.nats(torch.cat([start, *tokens])[None, :-1].to(device),
                       torch.cat(tokens)[None].to(device))[0]  # fmt: skip
    assert not torch.allclose(mixed, alone, rtol=1e-2)


def test_documents_are_numbered_within_each_row():
    rows = torch.tensor([[START, 1, START, START], [1, 2, START, 3]])
    assert number_documents(rows, START).tolist() == [[1, 1, 2, 3], [0, 0, 1, 1]]


def test_all_padding_of_a_row_is_one_document():
    rows = torch.tensor([[START, 1, 2, START, -1, -1], [1, -1, -1, -1, -1, -1], [-1] * 6])
    wanted = [[1, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1], [1] * 6]
    assert number_documents(rows, START).tolist() == wanted
