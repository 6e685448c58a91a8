"""Batches: what a row's encoding becomes, the order of the rows, and what is padded."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning.base.errors import InputError
from progtuning.data.batching import (
    EncodedRows,
    TokenBatches,
    TrainBatches,
    encode_examples,
    evaluation_batches,
    prefetch,
    split,
)
from progtuning.data.tables import Example
from progtuning.data.tokenization import Encoding, load_tokenizer
from progtuning.model.config import BertConfig

seeded = settings(max_examples=200, deadline=None, derandomize=True)
lengths_of = st.lists(st.integers(1, 64), min_size=1, max_size=200)


def encodings(lengths):
    """Row i holds the tokens 10 i + 1, 10 i + 2, ... and token types 0, 1, 0, 1, ..."""
    return [
        Encoding(10 * i + 1 + np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32) % 2)
        for i, length in enumerate(lengths)
    ]


def padded_share(batches, lengths):
    cells = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / cells


def test_a_batch_is_padded_to_its_longest_row_and_no_further():
    rows = EncodedRows(encodings([3, 1, 2, 9]), [0, 2, 1, 0], pad_token_id=7)
    batch = rows.collate([2, 0, 1])
    assert batch["input_ids"].tolist() == [[21, 22, 7], [1, 2, 3], [11, 7, 7]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True, True, False], [True] * 3, [True, False, False]]
    assert batch["index"].tolist() == [2, 0, 1] and batch["labels"].tolist() == [1, 0, 2]
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}
    integers = dict.fromkeys(("input_ids", "token_type_ids", "index", "labels"), torch.int64)
    assert dtypes == {**integers, "attention_mask": torch.bool}


def test_rows_of_one_length_have_no_mask_and_rows_without_label_no_labels():
    rows = EncodedRows(encodings([2, 2, 3]), None, pad_token_id=0)
    batch = rows.collate([1, 0])
    assert batch["attention_mask"] is None and "labels" not in batch
    assert rows.collate([0, 2])["attention_mask"] is not None
    with pytest.raises(ValueError, match="at least one row"):
        rows.collate([])


@pytest.mark.parametrize(
    ("labels", "dtype"), [([1, 0], torch.int64), ([1.0, 0.5], torch.float32), ([1, 0.5], torch.float32)]
)
def test_labels_are_classes_or_numbers(labels, dtype):
    batch = EncodedRows(encodings([1, 1]), labels, pad_token_id=0).collate([0, 1])
    assert batch["labels"].dtype == dtype and batch["labels"].tolist() == labels
    with pytest.raises(ValueError, match="labels must be as many as encodings, got 2 and 3"):
        EncodedRows(encodings([1, 1, 1]), labels, pad_token_id=0)


@seeded
@given(lengths_of, st.integers(1, 40), st.integers(0, 2**32), st.integers(0, 50), st.booleans())
def test_an_epoch_has_every_row_once_in_full_batches_but_one(lengths, batch_size, seed, epoch, group_by_length):
    batches = TrainBatches(lengths, batch_size, seed, group_by_length)
    found = batches.epoch(epoch)
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    sizes = sorted(len(batch) for batch in found)
    assert len(found) == len(batches) == -(-len(lengths) // batch_size)
    assert sizes[1:] == [batch_size] * (len(sizes) - 1) and 1 <= sizes[0] <= batch_size
    again = TrainBatches(lengths, batch_size, seed, group_by_length)
    again.epoch(epoch + 1)
    assert again.epoch(epoch) == found  # a pure function: no state is kept between epochs


@pytest.mark.parametrize("group_by_length", [True, False])
def test_epochs_and_seeds_differ_in_batches_and_in_their_order(group_by_length):
    lengths = np.random.default_rng(0).integers(1, 64, 640).tolist()
    batches = TrainBatches(lengths, 8, seed=1, group_by_length=group_by_length)
    first, second = batches.epoch(0), batches.epoch(1)
    other = TrainBatches(lengths, 8, seed=2, group_by_length=group_by_length).epoch(0)
    for found in (second, other):
        shared = {frozenset(batch) for batch in first} & {frozenset(batch) for batch in found}
        assert len(shared) < 4  # of 80
    longest = [max(lengths[i] for i in batch) for batch in first]
    falls = sum(a > b for a, b in zip(longest, longest[1:]))
    assert 25 < falls < 55  # of 79: neither rising nor falling


def test_a_small_set_is_not_sorted_as_a_whole():
    lengths = list(range(1, 65))
    batches = TrainBatches(lengths, 8, seed=0)
    assert {frozenset(batch) for batch in batches.epoch(0)} != {frozenset(batch) for batch in batches.epoch(1)}


def test_grouping_by_length_pads_a_few_percent_where_shuffling_pads_a_half():
    lengths = np.random.default_rng(0).geometric(1 / 25, 6400).clip(3, 128).tolist()
    grouped = padded_share(TrainBatches(lengths, 32, seed=0).epoch(0), lengths)
    shuffled = padded_share(TrainBatches(lengths, 32, seed=0, group_by_length=False).epoch(0), lengths)
    assert grouped < 0.08 and shuffled > 0.5


@seeded
@given(lengths_of, st.integers(64, 600), st.integers(0, 2**32), st.integers(1, 4), st.booleans())
def test_a_token_budget_holds_padding_too_and_every_epoch_has_every_row_once_in_as_many_batches(
    lengths, budget, seed, num_epochs, group_by_length
):
    batches = TokenBatches(lengths, budget, num_epochs, seed, group_by_length)
    for epoch in range(num_epochs):
        found = batches.epoch(epoch)
        assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
        assert len(found) == len(batches)
        assert all(0 < len(batch) * max(lengths[row] for row in batch) <= budget for batch in found)
        assert found == batches.epoch(epoch)


def test_a_token_budget_is_nearly_used_up_and_its_batches_differ_between_epochs():
    lengths = np.random.default_rng(0).geometric(1 / 25, 6400).clip(3, 128).tolist()
    batches = TokenBatches(lengths, 1024, 3, seed=0)
    assert sum(lengths) / (len(batches) * 1024) > 0.85
    assert len({len(batch) for batch in batches.epoch(0)}) > 10  # many short rows together, or few long ones
    shared = {frozenset(batch) for batch in batches.epoch(0)} & {frozenset(batch) for batch in batches.epoch(1)}
    assert len(shared) < len(batches) // 20


def test_a_row_above_the_token_budget_and_an_epoch_beyond_the_last_are_refused():
    with pytest.raises(InputError, match="--batch-tokens must be at least 9, the longest row's tokens, got 8"):
        TokenBatches([3, 9, 4], 8, 2, seed=0)
    with pytest.raises(ValueError, match="epoch must be in 0..1, got 2"):
        TokenBatches([3, 9, 4], 9, 2, seed=0).epoch(2)


@seeded
@given(lengths_of, st.integers(1, 40))
def test_evaluation_has_every_row_once_longest_first(lengths, batch_size):
    batches = evaluation_batches(lengths, batch_size)
    order = [row for batch in batches for row in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_the_index_of_a_batch_puts_results_back_in_the_order_of_the_rows():
    rows = EncodedRows(encodings([3, 9, 1, 4, 9]), None, pad_token_id=0)
    results = torch.zeros(5, dtype=torch.int64)
    for indices in evaluation_batches(rows.lengths, 2):
        batch = rows.collate(indices)
        results[batch["index"]] = batch["input_ids"][:, 0]
    assert results.tolist() == [1, 11, 21, 31, 41]


@seeded
@given(st.lists(st.integers(), max_size=40), st.integers(1, 50))
def test_micro_batches_keep_order_and_differ_by_at_most_one_row(batch, pieces):
    found = split(batch, pieces)
    assert [row for piece in found for row in piece] == batch
    assert len(found) == min(pieces, len(batch))
    sizes = [len(piece) for piece in found]
    assert not sizes or max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_prefetch_keeps_the_order_and_prepares_one_ahead_in_another_thread():
    started, threads = [], set()

    def prepare(item):
        started.append(item)
        threads.add(threading.get_ident())
        return 10 * item

    found = prefetch(range(5), prepare)
    assert next(found) == 0
    deadline = time.monotonic() + 10
    while started != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert started == [0, 1]  # the next, and no further
    assert list(found) == [10, 20, 30, 40] and threading.get_ident() not in threads and len(threads) == 1
    assert list(prefetch([], prepare)) == [] and list(prefetch([7], prepare)) == [70]


def test_prefetch_raises_what_preparing_raised_in_its_place_and_ends_its_thread():
    found = prefetch([1, 0, 2], lambda item: 1 / item)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)
    before = threading.active_count()
    abandoned = prefetch(range(5), str)
    next(abandoned)
    assert threading.active_count() == before + 1
    abandoned.close()
    assert threading.active_count() == before


def test_sizes_and_seeds_out_of_range_are_errors():
    for make in (lambda size: TrainBatches([1, 2], size, seed=0), lambda size: evaluation_batches([1, 2], size)):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            make(0)
    for make in (lambda: TrainBatches([], 2, seed=0), lambda: evaluation_batches([], 2)):
        with pytest.raises(ValueError, match="at least one row"):
            make()
    with pytest.raises(ValueError, match="seed must not be negative"):
        TrainBatches([1], 1, seed=-1)
    with pytest.raises(ValueError, match="pieces must be at least 1, got 0"):
        split([1], 0)


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "a", "b"]))
    config = BertConfig(7, 8, 1, 1, 8, max_position_embeddings=8, pad_token_id=4)
    return load_tokenizer(tmp_path, config)


def test_examples_are_encoded_with_pairs_labels_and_the_models_padding(tokenizer):
    rows = encode_examples([Example("a", "b b", 1), Example("a", "b", 0)], tokenizer)
    batch = rows.collate([0, 1])
    assert batch["input_ids"].tolist() == [[1, 5, 2, 6, 6, 2], [1, 5, 2, 6, 2, 4]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["labels"].tolist() == [1, 0] and rows.lengths.tolist() == [6, 5] and len(rows) == 2
    single = encode_examples([Example("a b a b")], tokenizer, max_length=4)
    assert single.labels is None and single.collate([0])["input_ids"].tolist() == [[1, 5, 6, 2]]
