"""The order of batches: a permutation an epoch, the same for any number of ranks, a function of seed and step alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfdist.errors import ConfigError, DataError
from mfdist.training.data.batches import NO_TARGET, BatchOrder, TokenBatches, validation_batches


@st.composite
def orders(draw: st.DrawFn) -> dict[str, int]:
    seq_len = draw(st.integers(1, 20))
    num_sequences = draw(st.integers(1, 300))
    rest = draw(st.integers(0, seq_len - 1))
    return {
        "num_tokens": num_sequences * seq_len + 1 + rest,
        "seq_len": seq_len,
        "batch_size": draw(st.integers(1, num_sequences)),
        "seed": draw(st.integers(0, 2**40)),
    }


@given(orders())
def test_every_epoch_visits_every_sequence_once(arguments: dict[str, int]) -> None:
    order = BatchOrder(**arguments)
    num_sequences = (arguments["num_tokens"] - 1) // arguments["seq_len"]
    num_steps = -(-3 * num_sequences // arguments["batch_size"])
    visited = np.concatenate([order.sequence_ids(step) for step in range(num_steps)])
    for epoch in range(3):
        part = visited[epoch * num_sequences : (epoch + 1) * num_sequences]
        assert sorted(part.tolist()) == list(range(num_sequences))


@given(orders(), st.integers(0, 10**12), st.data())
def test_the_ranks_parts_are_the_batch_whatever_their_number(
    arguments: dict[str, int], step: int, data: st.DataObject
) -> None:
    batch_size = arguments["batch_size"]
    world_size = data.draw(st.sampled_from([size for size in range(1, batch_size + 1) if batch_size % size == 0]))
    parts = [BatchOrder(**arguments, rank=rank, world_size=world_size).sequence_ids(step) for rank in range(world_size)]
    whole = BatchOrder(**arguments).sequence_ids(step)
    assert whole.dtype == np.int64
    assert np.concatenate(parts).tolist() == whole.tolist()


@given(orders(), st.integers(0, 10**6))
def test_the_epoch_is_that_of_the_batch_s_first_sequence(arguments: dict[str, int], step: int) -> None:
    order = BatchOrder(**arguments)
    assert order.epoch_of(step) * order.num_sequences <= step * arguments["batch_size"]
    assert step * arguments["batch_size"] < (order.epoch_of(step) + 1) * order.num_sequences


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        order = BatchOrder(1001, seq_len=1, batch_size=1000, seed=seed)
        return tuple(order.sequence_ids(number).tolist())

    seen = {epoch(seed, number) for seed in range(5) for number in range(5)}
    assert len(seen) == 25
    assert tuple(range(1000)) not in seen


def test_the_order_has_no_visible_pattern() -> None:
    order = BatchOrder(4097, seq_len=1, batch_size=4096, seed=0)
    epochs = np.stack([order.sequence_ids(step) for step in range(200)])
    # Where each of 16 equal parts of the text falls, over 200 epochs: chi-square with 255 degrees of freedom.
    counts = np.zeros((16, 16))
    np.add.at(counts, (np.broadcast_to(np.arange(4096) // 256, epochs.shape), epochs // 256), 1)
    expected = 200 * 4096 / 256
    assert ((counts - expected) ** 2 / expected).sum() < 350
    neighbours = np.mean(np.abs(np.diff(epochs, axis=1)) == 1)
    assert neighbours == pytest.approx(2 / 4096, rel=0.15)


def test_a_huge_text_needs_no_memory_for_its_order() -> None:
    order = BatchOrder(2**50 + 1, seq_len=1024, batch_size=64, seed=1)
    ids = order.sequence_ids(10**9)
    assert len(set(ids.tolist())) == 64
    assert 0 <= ids.min() < ids.max() < 2**40


@pytest.mark.parametrize("num_tokens", [0, 1, 32])
def test_too_little_text_says_how_much_there_is_and_must_be(num_tokens: int) -> None:
    with pytest.raises(DataError, match=f"4 x 8 [+] 1 = 33 tokens; got {num_tokens};"):
        BatchOrder(num_tokens, seq_len=8, batch_size=4, seed=0)
    assert BatchOrder(33, seq_len=8, batch_size=4, seed=0).num_sequences == 4


@pytest.mark.parametrize(("rank", "world_size"), [(0, 3), (2, 2), (-1, 2)])
def test_a_batch_that_does_not_divide_among_ranks_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of the number of ranks"):
        BatchOrder(1000, seq_len=8, batch_size=4, seed=0, rank=rank, world_size=world_size)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_targets_are_the_tokens_one_further_on(dtype: type[np.uint16 | np.uint32]) -> None:
    tokens = np.arange(100, dtype=dtype) + np.iinfo(dtype).max - 100
    order = BatchOrder(100, seq_len=9, batch_size=3, seed=0)
    inputs, targets = TokenBatches(tokens, order).at(2)
    assert inputs.shape == targets.shape == (3, 9)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)
    starts = order.sequence_ids(2) * 9
    assert inputs[:, 0].tolist() == tokens[starts].tolist()


@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 5))
def test_every_validation_token_but_the_first_is_a_target_once(num_tokens: int, seq_len: int, batch_size: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    seen, sizes = [], []
    for inputs, targets in validation_batches(tokens, seq_len, batch_size):
        scored = targets != NO_TARGET
        assert torch.equal(inputs[scored] + 1, targets[scored])
        seen += targets[scored].tolist()
        sizes.append(len(inputs))
    assert seen == list(range(1, num_tokens))
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size


@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 12))
def test_a_part_of_the_validation_text_is_full_sequences_spread_over_it(
    num_tokens: int, seq_len: int, limit: int
) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    batches = list(validation_batches(tokens, seq_len, 4, max_sequences=limit))
    inputs = torch.cat([batch for batch, _ in batches])
    targets = torch.cat([batch for _, batch in batches])
    assert len(inputs) == min(limit, -(-(num_tokens - 1) // seq_len))
    if limit < -(-(num_tokens - 1) // seq_len):
        assert torch.equal(inputs + 1, targets)
        starts = inputs[:, 0]
        assert starts[0] == 0
        gaps = torch.diff(starts)
        assert len(gaps) == 0 or (gaps.min() >= seq_len and gaps.max() - gaps.min() <= seq_len)


def test_too_little_validation_text_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2 tokens; got 1"):
        next(validation_batches(np.zeros(1, dtype=np.uint16), 8, 1))
