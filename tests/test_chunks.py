"""gcpo.py's chunks: the recursion on curves cut by hand, and the draw."""

from collections import Counter

import pytest
import torch

import gcpo
from conftest import metrics, parse
from gcpo import adaptive_chunks, draw_chunks, parse_chunks

CURVES = [
    # longest, curve, sizes, and why: the sign of each step
    (4, [3], [1]),  # a chunk of one is small enough
    (1, [3, 5], [1, 1]),  # + +: no change, midpoint
    (2, [3, 5], [2]),  # small enough
    (4, [8, 7, 6, 5, 4, 3, 2, 1], [4, 4]),  # monotone: - everywhere, midpoint
    (2, [8, 7, 6, 5, 4, 3, 2, 1], [2, 2, 2, 2]),  # halves: 4 values of second difference 0, midpoint again
    (4, [1, 2, 3, 4, 3, 2, 1], [4, 3]),  # one peak: + + + + - - -
    (3, [9, 8, 6, 7, 9], [3, 2]),  # the docstring's: - - - + +
    (3, [1, 3, 2, 1, 2, 4, 3], [2, 2, 2, 1]),  # two peaks: + + | - - | + + | -
    (2, [5, 5, 5, 5, 5], [2, 1, 2]),  # flat: midpoint 2 | 3, then 3 values at its midpoint 1 | 2
    (4, [1, 2, 1, 2, 1, 2], [2, 1, 1, 1, 1]),  # zigzag: + + - + - +
    (4, [4, 3, 3, 2, 3, 4], [4, 2]),  # a zero keeps the sign before it: - - - - + +
    (4, [4, 4, 5, 6, 5], [4, 1]),  # zeros at the start take the first sign there is: + + + + -
    # + everywhere, so the midpoint: [0 1 4 9] and [16 26 35 42 47]. The second is longer than 4: differences
    # 10 9 7 5 have the second differences -1 -2 -2, - everywhere, so the midpoint: [16 26] and [35 42 47]
    (4, [0, 1, 4, 9, 16, 26, 35, 42, 47], [4, 2, 3]),
]


@pytest.mark.parametrize("scale", [1, 0.1, 1e-3, 7])
@pytest.mark.parametrize("longest, curve, sizes", CURVES)
def test_chunks_of_curves_cut_by_hand(longest, curve, sizes, scale):
    """Whatever the scale: differences that are 0 but for rounding in float32 are 0."""
    assert adaptive_chunks(torch.tensor([float(v) for v in curve]) * scale, longest) == sizes


def test_second_order_cuts_where_the_bend_changes():
    """[0 1 3 6 8 9 9.5] rises: the midpoint gives [0 1 3] and [6 8 9 9.5]; order 2 of the second is - - ."""
    assert adaptive_chunks(torch.tensor([0, 1, 3, 6, 8, 9, 9.5]), 3) == [3, 2, 2]
    # up and down over 16: differences + * 7, 0, - * 7, and the zero keeps +: a rise of 9 and a fall of 7.
    # Order 2 of the rise [0 1 3 6 10 13 15 16 16]: 1 1 1 -1 -1 -1 -1, ending at steps 2 to 8: + * 5, - * 4.
    # Order 2 of the fall [15 13 10 6 3 1 0]: -1 -1 1 1 1 at steps 2 to 6: - * 4, + * 3.
    half = [0, 1, 3, 6, 10, 13, 15, 16]
    assert adaptive_chunks(torch.tensor([*half, *reversed(half)], dtype=torch.float32), 5) == [5, 4, 4, 3]


def test_halves():
    for K, sizes in ((1, [1]), (2, [1, 1]), (3, [1, 2]), (8, [4, 4])):
        assert parse_chunks(parse("gcpo", "--chunks", "halves"), list(range(K))) == sizes


def test_weighted_draw_is_in_proportion_to_the_mean_of_l1rel():
    """Chi-squared test of the first (here: only) chunk drawn, at 0.1%: equation 17 of the paper."""
    l1rel, sizes = torch.tensor([0.9, 0.7, 0.2, 0.4, 0.3, 0.05]), [2, 1, 3]
    mean = torch.tensor([0.8, 0.2, 0.25])
    draws, gen = Counter(), torch.Generator().manual_seed(1)
    for numbers in torch.empty(6000, 6).exponential_(generator=gen):
        average = draw_chunks(l1rel, sizes, 0.34, True, numbers)
        first = int(average.diagonal().nonzero()[0])
        assert average.sum().item() == pytest.approx(sizes[[0, 2, 3].index(first)])
        draws[first] += 1
    expected = {start: 6000 * p for start, p in zip((0, 2, 3), (mean / mean.sum()).tolist())}
    assert sum((draws[k] - e) ** 2 / e for k, e in expected.items()) < 13.8  # 2 degrees of freedom


def test_uniform_draw_is_uniform_and_without_replacement():
    draws, gen = Counter(), torch.Generator().manual_seed(0)
    for numbers in torch.empty(3000, 6).exponential_(generator=gen):
        trained = draw_chunks(torch.rand(6), [1, 2, 3], 0.67, False, numbers).diagonal().bool().tolist()
        assert sum(trained) in (3, 4, 5)  # two different chunks, whole
        draws[tuple(trained)] += 1
    assert len(draws) == 3 and all(abs(n - 1000) < 120 for n in draws.values())


def test_metrics_by_step(record):
    """L1rel from the latents of a rollout; cuts of three images by hand."""
    seen = record(gcpo, "--iterations", "1")
    (_, (x, x_next, _, _)), line = seen.rollouts[0], metrics(seen.folder)[1]
    K, N = x.shape[:2]
    for k in range(K):
        l1rel = [((x_next[k, n] - x[k, n]).abs().sum() / x[k, n].abs().sum()).item() for n in range(N)]
        assert line["l1rel_by_step"][k] == pytest.approx(sum(l1rel) / N, rel=1e-10)
    found = gcpo.chunk_metrics(torch.zeros(3, 4), [[2, 2], [1, 1, 2], [4]])
    assert found["chunk_cuts"] == pytest.approx([0, 1 / 3, 2 / 3, 0])
