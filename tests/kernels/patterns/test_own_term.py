"""A term that is written outside of the package, in one class, is a term like any other."""

from dataclasses import dataclass

import torch

from kernels.attend import attend
from kernels.common.interpreter import device_function
from kernels.patterns import causal, parse, random_blocks, window
from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import constructor
from kernels.patterns.retention import cache_plan
from tests.kernels.attend.test_attend import cotangents, inputs
from tests.kernels.patterns.test_tiles import assert_lists, brute_force
from tests.support.oracle import assert_as_exact_as_torch, dense_attention


@constructor
def same_parity(shift: int) -> Pattern:
    """Visible when ``i + shift`` and ``j`` are both even or both odd."""
    return SameParity(shift)


@dataclass(frozen=True)
class SameParity(Pattern):
    shift: int

    def _visible(self, i, j, head, length):
        return (i + self.shift - j) % 2 == 0

    def _known(self, box):
        single = (box.i_low == box.i_high) & (box.j_low == box.j_high)
        some = ~single | self._visible(box.i_low, box.j_low, 0, None)
        return box.exact(some, single & some, when=box.contiguous)

    @property
    def numbers(self):
        return (self.shift,)

    @staticmethod
    @device_function
    def rule(i, j, shift):
        return (i + shift - j) % 2 == 0

    def __repr__(self):
        return f"same_parity({self.shift})"


PATTERN = causal() & (window(3) | same_parity(1) & (window(40) | random_blocks(1, block=8)))


def test_it_is_read_back_from_text():
    assert parse(repr(PATTERN)) == PATTERN


def test_its_tiles_are_those_of_the_dense_mask():
    wanted = brute_force(PATTERN, *PATTERN.order, 90, 90, (16, 16), range(2))
    assert_lists(PATTERN.tiles(90, 16, heads=2), *wanted)


def test_the_kernel_attends_to_what_it_shows(kernel_device):
    q, k, v = inputs(B=1, L=90, Hq=2, Hkv=2, D=16, Dv=16, device=kernel_device)
    mask = torch.stack([PATTERN.dense(90, head) for head in range(2)]).to(kernel_device)

    def ours(q, k, v):
        return attend(q, k, v, PATTERN, implementation="fused")

    def plain(q, k, v):
        return dense_attention(q, k, v, mask)

    assert_as_exact_as_torch(ours, plain, [q, k, v], cotangents(q, v))


def test_decoding_keeps_a_key_as_long_as_it_shows_it():
    pattern = causal() & same_parity(0) & window(5)
    last = cache_plan(pattern, 1, 20).last[0]
    assert last.tolist() == [min(j + 4, 19 - (19 - j) % 2) for j in range(20)]
