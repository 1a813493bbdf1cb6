import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.expert.synthetic import SyntheticData

from paris_swarm.expert import rows as rows_module
from paris_swarm.expert.rows import BatchOrder, Rows, drop_captions, select_rows


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 1000), st.integers(0, 30))
def test_a_batch_is_a_function_of_seed_and_step(count: int, batch: int, seed: int, step: int) -> None:
    walked = BatchOrder(count, batch, seed)
    for earlier in range(step):
        walked.positions(earlier)
    assert np.array_equal(walked.positions(step), BatchOrder(count, batch, seed).positions(step))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 1000))
def test_an_epoch_holds_every_row_once(count: int, batch: int, seed: int) -> None:
    order = BatchOrder(count, batch, seed)
    seen = np.concatenate([order.positions(step) for step in range(-(-3 * count // batch))])[: 3 * count]
    for epoch in seen.reshape(3, count):
        assert sorted(epoch.tolist()) == list(range(count))


def test_other_seeds_give_other_orders() -> None:
    assert not np.array_equal(BatchOrder(40, 40, 1).positions(0), BatchOrder(40, 40, 2).positions(0))
    order = BatchOrder(40, 40, 1)
    assert not np.array_equal(order.positions(0), order.positions(1))


def test_held_out_rows_are_never_trained_on() -> None:
    data = SyntheticData()
    labels = np.arange(data.count) % 2
    data.digests[6] = data.digests[4]  # a copy of the held-out row
    chosen = select_rows(data, labels, 0, [data.digests[4].tobytes()])
    assert set(chosen.tolist()) == set(range(0, data.count, 2)) - {4, 6}


def test_nothing_left_is_an_error() -> None:
    data = SyntheticData()
    with pytest.raises(ValueError, match="cluster 5"):
        select_rows(data, np.zeros(data.count, dtype=np.int64), 5)
    with pytest.raises(ValueError, match="16 bytes"):
        select_rows(data, None, None, [b"short"])
    with pytest.raises(ValueError, match="one label a row"):
        select_rows(data, np.zeros(3, dtype=np.int64), 0)


def test_a_batch_is_what_the_shards_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SyntheticData()
    held = Rows(data, np.arange(5, 25)).batch(np.array([3, 0, 7]))
    monkeypatch.setattr(rows_module, "PRELOAD_BYTES", 0)
    read = Rows(data, np.arange(5, 25)).batch(np.array([3, 0, 7]))
    assert held.rows.tolist() == [8, 5, 12]
    for name in ("x0", "states", "mask", "rows"):
        assert torch.equal(getattr(held, name), getattr(read, name))
    assert held.x0.shape == (3, 3, 8, 8)
    states, lengths = data.states(np.array([8, 5, 12]))
    assert held.mask.sum(1).tolist() == lengths.tolist()
    longest = max(2, int(lengths.max()))
    assert np.array_equal(held.states.numpy(), states[:, :longest].astype(np.float32))


def test_dropped_captions_become_the_null_caption() -> None:
    data = SyntheticData()
    source = Rows(data, np.arange(32))
    batch = source.batch(np.arange(32))
    draw = torch.Generator().manual_seed(0)
    states, mask = drop_captions(batch.states, batch.mask, source.null, 1.0, draw)
    assert not states.any() and mask.sum(1).tolist() == [2] * 32
    states, mask = drop_captions(batch.states, batch.mask, source.null, 0.0, draw)
    assert torch.equal(states, batch.states) and torch.equal(mask, batch.mask)
