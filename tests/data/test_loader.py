"""Data order and batches: nothing twice, nothing missed, the same for any number of ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatgot.data.loader import IGNORE_INDEX, LOOK_AHEAD, DataOrder, EvalBatches, TrainBatches

sizes = st.tuples(st.integers(2, 400), st.integers(1, 40)).filter(lambda s: s[0] > s[1])


@given(sizes, st.integers(0, 2**70), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_epoch_visits_every_block_once_and_stays_inside(size, seed, epoch):
    n_tokens, block = size
    order = DataOrder(n_tokens, block, seed)
    n = order.samples_per_epoch
    starts = order.starts(np.arange(epoch * n, (epoch + 1) * n))
    gaps = np.diff(np.sort(starts))
    assert (gaps == block).all()  # disjoint targets, no block twice
    assert starts.min() >= 0
    assert starts.max() + block + 1 <= n_tokens
    assert n == max((n_tokens - block) // block, 1)


@given(sizes, st.integers(0, 2**32), st.lists(st.integers(0, 10**12), max_size=20))
@settings(max_examples=50, deadline=None)
def test_order_is_a_pure_function_of_seed_and_index(size, seed, indices):
    together = DataOrder(size[0], size[1], seed).starts(np.array(indices, np.int64))
    alone = [int(DataOrder(size[0], size[1], seed).starts(np.array([i]))[0]) for i in indices]
    assert together.tolist() == alone


def test_order_never_changes_between_versions():
    """A run resumed with a later version must go on with the same samples: these numbers may never be edited."""
    assert DataOrder(1000, 8, 1337).starts(np.array([0, 1, 2, 123, 124, 10**9])).tolist() == [
        493,
        37,
        957,
        101,
        16,
        386,
    ]


def test_other_seed_and_other_epoch_give_other_orders():
    n = DataOrder(10_000, 10, 0).samples_per_epoch
    first, second = (DataOrder(10_000, 10, 0).starts(np.arange(e * n, (e + 1) * n)) for e in (0, 1))
    other = DataOrder(10_000, 10, 1).starts(np.arange(n))
    assert (first // 10 == second // 10).mean() < 0.02
    assert (first // 10 == other // 10).mean() < 0.02
    assert (
        len({int(DataOrder(10_000, 10, 0).starts(np.array([e * n]))[0]) % 10 for e in range(60)}) == 10
    )  # every offset occurs


def test_order_is_shuffled_evenly():
    """Neighbours in the order are no neighbours in the text, and every stretch of the order covers the whole text."""
    order = DataOrder(40_010, 10, 3)
    blocks = order.starts(np.arange(order.samples_per_epoch)) // 10
    assert abs(np.corrcoef(blocks[:-1], blocks[1:])[0, 1]) < 0.05
    assert np.histogram(blocks[:1000], bins=10, range=(0, order.samples_per_epoch))[0].min() > 60


@pytest.mark.parametrize("n", [2, 3, 5, 13])
def test_short_epochs_begin_with_every_block_equally_often(n):
    order = DataOrder(n * 4 + 4, 4, 7)
    assert order.samples_per_epoch == n
    first = order.starts(np.arange(2000 * n) * n) // 4
    counts = np.bincount(first, minlength=n)
    assert ((counts - 2000) ** 2 / 2000).sum() < 3 * n + 12  # chi squared with n - 1 degrees of freedom


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="8 tokens do not hold one sample of block_size \\+ 1 = 9"):
        DataOrder(8, 8, 0)
    with pytest.raises(ValueError, match="negative"):
        DataOrder(100, 8, 0).starts(np.array([-1]))


@given(
    world=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    step=st.integers(0, 50),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_global_batch_is_the_same_for_any_ranks_micro_batch_and_accumulation(world, micro, accumulation, step, data):
    tokens = np.arange(501, dtype=np.uint16)
    order = DataOrder(len(tokens), 7, 11)
    global_batch = world * micro * accumulation
    first = step * global_batch
    seen, trace = [], []
    for rank in range(world):
        batches = TrainBatches(tokens, order, global_batch, micro, rank, world)
        micro_batches = list(batches.micro_batches(first))
        assert len(micro_batches) == accumulation == batches.accumulation
        assert all(x.shape == y.shape == (micro, 7) and x.dtype == y.dtype == torch.int64 for x, y in micro_batches)
        assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in micro_batches)
        indices = batches.indices(first)
        assert (
            torch.cat([x for x, _ in micro_batches])[:, 0].tolist() == order.starts(indices).tolist()
        )  # tokens[i] == i
        trace.append(indices.reshape(accumulation, micro))
        seen.extend(indices.tolist())
    assert sorted(seen) == list(range(first, first + global_batch))
    by_micro_step = np.concatenate(trace, axis=1)  # each accumulation step takes the next samples, whatever the ranks
    assert (np.diff(np.sort(by_micro_step, axis=1).reshape(-1)) == 1).all()


@given(firsts=st.lists(st.integers(0, 3 * LOOK_AHEAD), min_size=1, max_size=6), steps=st.integers(0, 2000))
@settings(max_examples=25, deadline=None)
def test_a_batch_is_the_same_whatever_was_asked_before(firsts, steps):
    tokens = np.arange(501, dtype=np.uint16)
    order = DataOrder(len(tokens), 7, 11)
    batches = TrainBatches(tokens, order, 6, 3, 0, 1)
    for first in (firsts[0], firsts[0] + 6 * steps, *firsts):  # the next steps, and jumps as after a rollback
        [inputs, more] = [x for x, _ in batches.micro_batches(first)]
        assert torch.cat([inputs, more])[:, 0].tolist() == order.starts(first + np.arange(6)).tolist()
        assert batches.batch_hash(first) == TrainBatches(tokens, order, 6, 6, 0, 1).batch_hash(first)


def test_batch_that_does_not_divide_is_refused():
    tokens = np.zeros(100, np.uint8)
    order = DataOrder(100, 8, 0)
    with pytest.raises(ValueError, match="global batch 6 is not a multiple of micro batch 2 x 2 ranks"):
        TrainBatches(tokens, order, 6, 2, 0, 2)
    with pytest.raises(ValueError, match="the order is for 100 tokens, got 99"):
        TrainBatches(tokens[:99], order, 4, 2, 0, 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        TrainBatches(tokens, order, 4, 2, 2, 2)


def test_batches_come_from_a_memory_map_unchanged(tmp_path):
    np.arange(300, dtype="<u2").tofile(tmp_path / "t.bin")
    tokens = np.memmap(tmp_path / "t.bin", dtype="<u2", mode="r")
    (x, y), *_ = TrainBatches(tokens, DataOrder(300, 9, 0), 4, 4, 0, 1).micro_batches(0)
    assert torch.equal(x + 1, y)
    assert x.is_contiguous()
    assert y.is_contiguous()


@given(n=st.integers(2, 300), block=st.integers(1, 40), batch=st.integers(1, 5), world=st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=100, deadline=None)
def test_evaluation_sees_every_target_exactly_once(n, block, batch, world):
    tokens = np.arange(1000, 1000 + n, dtype=np.uint16)
    targets, lengths = [], set()
    for rank in range(world):
        batches = EvalBatches(tokens, block, batch, rank, world)
        got = list(batches)
        assert len(got) == len(batches)
        lengths.add(len(got))
        assert batches.target_tokens == n - 1
        for x, y in got:
            assert x.shape == y.shape == (batch, block)
            real = y != IGNORE_INDEX
            assert torch.equal(x[real] + 1, y[real])
            assert (x[~real] == 0).all()
            targets.extend(y[real].tolist())
    assert len(lengths) == 1
    assert sorted(targets) == list(range(1001, 1000 + n))


@given(n=st.integers(2, 300), block=st.integers(1, 40), batch=st.integers(1, 5), most=st.integers(1, 320))
@settings(max_examples=100, deadline=None)
def test_evaluation_of_a_part_sees_the_same_even_windows_whatever_the_ranks(n, block, batch, most):
    tokens = np.arange(1000, 1000 + n, dtype=np.uint16)
    seen = set()
    for world in (1, 3):
        parts = [EvalBatches(tokens, block, batch, rank, world, most) for rank in range(world)]
        targets = sorted(int(t) for part in parts for _, y in part for t in y[y != IGNORE_INDEX])
        assert len(targets) == len(set(targets)) == parts[0].target_tokens <= max(most, block)
        seen.add(tuple(targets))
    [targets] = seen
    if most >= n - 1:
        assert len(targets) == n - 1
    firsts = [target - 1001 for target in targets if (target - 1001) % block == 0]
    gaps = {b - a for a, b in pairwise(firsts)}
    assert len(targets) > most - block or len(targets) > n - 1 - block, "no window less than there is room for"
    assert not gaps or max(gaps) - min(gaps) <= block


def test_evaluation_without_a_target_is_refused():
    with pytest.raises(ValueError, match="1 tokens hold no target"):
        EvalBatches(np.zeros(1, np.uint8), 4, 2, 0, 1)


def test_batch_hash_is_the_same_for_every_split_of_the_batch_and_not_for_another_batch():
    tokens = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint8)
    order = DataOrder(len(tokens), 16, seed=3)

    def total(first: int, micro: int, world_size: int, of: np.ndarray = tokens) -> int:
        hashes = []
        for rank in range(world_size):
            batches = TrainBatches(of, order, 8, micro, rank, world_size)
            hashes.append(batches.batch_hash(first))
        return sum(hashes) % 2**64

    one = total(0, 8, 1)
    assert {total(0, micro, world_size) for micro, world_size in ((8, 1), (2, 1), (4, 2), (1, 2), (1, 8))} == {one}
    assert total(8, 8, 1) != one
    changed = tokens.copy()
    changed[int(order.starts(np.array([5]))[0]) + 7] ^= 1
    assert total(0, 8, 1, changed) != one


@given(sizes, st.integers(0, 2**32), st.integers(0, 1000), st.integers(0, 300), st.data())
@settings(max_examples=150, deadline=None)
def test_the_way_back_from_tokens_to_samples_is_what_brute_force_finds(size, seed, first, more, data):
    n_tokens, block = size
    order, indices = DataOrder(n_tokens, block, seed), np.arange(first, first + more)
    begin = data.draw(st.integers(0, n_tokens - 1))
    end = data.draw(st.integers(begin + 1, n_tokens))
    starts = order.starts(indices)
    expected = indices[(starts < end) & (starts + block + 1 > begin)]
    samples, at = order.samples_with(begin, end, first, first + more - 1)
    assert samples.tolist() == expected.tolist()
    assert at.tolist() == order.starts(samples).tolist()
