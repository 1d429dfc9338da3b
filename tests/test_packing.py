"""Rows: full, shuffled, whole documents, the same everywhere."""

import numpy as np
import pytest

from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.packing import pack_epochs, pack_rows

T = 2048


def chat_like(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as chat data has them: log-normal, a good tenth of them cut at T."""
    lengths = np.random.default_rng(seed).lognormal(6.5, 0.95, count)
    return np.clip(lengths, 8, T).astype(np.int64)


def tokens_in_rows(rows, lengths) -> list[int]:
    return [int(lengths[rows[r]].sum()) for r in range(len(rows))]


def test_rows_of_chat_data_are_nearly_full():
    for count in (20_000, 3_000):
        lengths = chat_like(count)
        rows = pack_rows(lengths, T, seed=0)
        assert lengths.sum() / (len(rows) * T) > 0.97


def test_every_document_stands_once_and_whole_in_a_row():
    lengths = chat_like(10_000)
    rows = pack_rows(lengths, T, seed=3)
    assert sorted(rows.documents.tolist()) == list(range(len(lengths)))
    assert max(tokens_in_rows(rows, lengths)) <= T
    assert all(len(rows[r]) for r in range(len(rows)))


def test_documents_of_any_length_are_packed_as_well_as_can_be():
    exact = pack_rows(np.array([5, 3, 7, 1, 4, 4]), 8, seed=0)
    assert len(exact) == 3  # 24 tokens in rows of 8
    assert len(pack_rows(np.full(7, 8), 8, seed=0)) == 7
    assert len(pack_rows(np.ones(17, int), 8, seed=0)) == 3
    assert len(pack_rows(np.zeros(0, int), 8, seed=0)) == 0


def test_rows_depend_on_seed_and_epoch_alone():
    lengths = chat_like(500)
    first, again = pack_rows(lengths, T, 1, 2), pack_rows(lengths, T, 1, 2)
    assert np.array_equal(first.documents, again.documents)
    assert np.array_equal(first.offsets, again.offsets)
    for other in (pack_rows(lengths, T, 2, 2), pack_rows(lengths, T, 1, 3)):
        assert not np.array_equal(first.documents, other.documents)


def test_rows_are_in_random_order():
    lengths = chat_like(10_000)
    rows = pack_rows(lengths, T, seed=0)
    sizes = np.array([len(rows[r]) for r in range(len(rows))])
    first, second = np.array_split(sizes, 2)
    assert abs(first.mean() / second.mean() - 1) < 0.1
    position = np.arange(len(rows.documents))
    assert abs(np.corrcoef(position, rows.documents)[0, 1]) < 0.05
    assert abs(np.corrcoef(position, lengths[rows.documents])[0, 1]) < 0.05


def test_a_document_that_fits_no_row_is_an_error():
    with pytest.raises(DataError, match="documents of 3 to 9 tokens do not fit rows of 8"):
        pack_rows(np.array([3, 9]), 8, seed=0)


def test_a_run_is_its_epochs_one_after_the_other():
    lengths = chat_like(300)
    ones = np.ones(300)
    rows = pack_epochs(lengths, ones, T, seed=5, num_epoch=3)
    assert rows.epoch_ends[-1] == len(rows)
    start = 0
    for epoch, end in enumerate(rows.epoch_ends):
        alone = pack_rows(lengths, T, 5, epoch)
        assert end - start == len(alone)
        for r in range(len(alone)):
            assert np.array_equal(rows[start + r], alone[r])
        start = end


def test_a_longer_run_begins_with_a_shorter_one():
    lengths, ones = chat_like(300), np.ones(300)
    short = pack_epochs(lengths, ones, T, 5, 2)
    longer = pack_epochs(lengths, ones, T, 5, 1, min_rows=len(short) * 2 + 1)
    assert len(longer) > 2 * len(short)
    assert longer.epoch_ends[:2] == short.epoch_ends
    assert np.array_equal(longer.documents[: len(short.documents)], short.documents)


def test_a_weight_is_the_share_of_epochs_a_document_is_in():
    lengths = np.full(1000, 100)
    weights = np.repeat([1.0, 0.75, 0.5, 0.25], 250)
    epochs = []
    for epoch in range(4):
        rows = pack_epochs(lengths, weights, T, 0, 4)
        ends = (0, *rows.epoch_ends)
        first, last = rows.offsets[ends[epoch]], rows.offsets[ends[epoch + 1]]
        epochs.append(np.bincount(rows.documents[first:last], minlength=1000))
        assert epochs[-1].reshape(4, 250).sum(1).tolist() == [250, 188, 125, 62]
        assert epochs[-1].max() == 1
    halves = [counts[500:750] for counts in epochs]
    assert not np.array_equal(halves[0], halves[1])  # another half each epoch
    assert 200 < (np.sum(halves, 0) > 0).sum() < 250  # 1 - 0.5 ** 4 of them by now


def test_weights_that_leave_nothing_are_an_error():
    with pytest.raises(DataError, match="no conversation in epoch 1"):
        pack_epochs(np.array([5, 5]), np.array([0.1, 0.1]), 8, 0, 1)
