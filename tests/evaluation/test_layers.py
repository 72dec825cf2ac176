"""Which share of random blocks lies inside packed documents."""

import logging
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate

from data.batches.batch import Batch
from evaluation.layers import share_of_draws_inside
from kernels.patterns import causal, random_blocks, window
from tests.support.configs import SMALL, composed
from training.callbacks.summary import Summary

SIZES = [8, 20, 36]  # of documents, in whole blocks of 4
DOCUMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))[None].int()


def test_a_draw_counts_where_the_document_sees_it():
    pattern, heads, seen = random_blocks(2, block=4), 3, 0
    for size in SIZES:
        i = torch.arange(size)
        head = torch.arange(heads)[:, None, None]
        seen += int(pattern.visible(i[:, None], i[None], head, length=64).sum())
    drawn = heads * 2 * 16 * 16  # cells of two blocks for each of 16
    share = share_of_draws_inside(pattern, DOCUMENTS, heads)
    assert share == pytest.approx(seen / drawn)
    assert 0 < share < 1


def test_all_draws_of_a_row_of_one_document_count_and_causal_ones_are_no_matter():
    one = torch.zeros(2, 64, dtype=torch.int32)
    assert share_of_draws_inside(window(4, 4) | random_blocks(2, block=4), one, 2) == 1
    assert share_of_draws_inside(causal() & random_blocks(2, block=4), DOCUMENTS, 2) is None
    assert share_of_draws_inside(window(4, 4), DOCUMENTS, 2) is None


@pytest.mark.parametrize("causal", ["true", "false"])
def test_a_run_of_packed_rows_says_once_how_many_draws_are_lost(causal, caplog, tmp_path):
    bigbird = f"model.attention.bigbird={{block: 4, causal: {causal}}}"
    model = instantiate(composed("model=bigbird", *SMALL, bigbird).model)
    summary, task = Summary(str(tmp_path)), SimpleNamespace(model=model)
    with caplog.at_level(logging.INFO, logger="strider"):
        for number, documents in enumerate((None, DOCUMENTS, DOCUMENTS)):
            batch = Batch(torch.zeros(1, 64), torch.zeros(1, 64), documents)
            summary.on_train_batch_start(None, task, batch, number)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (causal == "false")
    assert all("bigbird: random blocks" in line for line in said)
