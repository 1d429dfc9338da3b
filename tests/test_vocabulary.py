"""The draft vocabulary: chosen by count, ends of turn always in, offsets never absolute ids."""

import json

import numpy as np
import pytest

from MaxDraft.drafts.vocabulary import DraftVocabulary, VocabularyError, select


def test_frequent_tokens_are_taken_and_required_ones_always():
    counts = np.array([5, 0, 9, 1, 7, 0, 3, 2])
    assert select(counts, [], 3).draft_to_target.tolist() == [0, 2, 4]
    assert select(counts, [5], 3).draft_to_target.tolist() == [2, 4, 5]
    assert select(counts, [5, 2, 5], 3).draft_to_target.tolist() == [2, 4, 5]
    assert select(counts, [1, 3, 5], 3).draft_to_target.tolist() == [1, 3, 5]


def test_of_equal_counts_the_lower_id_is_taken():
    assert select(np.array([1, 4, 4, 4, 1]), [], 2).draft_to_target.tolist() == [1, 2]
    assert select(np.array([0, 0, 0, 4, 0]), [], 3).draft_to_target.tolist() == [0, 1, 3]


@pytest.mark.parametrize("size", [6, 7, 32000])
def test_a_size_at_or_above_the_targets_is_the_whole_vocabulary(size):
    whole = select(np.array([0, 0, 3, 0, 1, 0]), [5], size)
    assert whole.draft_to_target.tolist() == [0, 1, 2, 3, 4, 5]
    assert whole.d2t.tolist() == [0] * 6
    assert whole.t2d.all()
    assert whole.coverage(np.array([0, 0, 3, 0, 1, 0])) == 1.0


def test_maps_lead_from_draft_to_target_and_back():
    vocabulary = DraftVocabulary(np.array([1, 2, 5, 9]), 12)
    assert vocabulary.draft_to_target.dtype == np.int32
    assert vocabulary.d2t.dtype == np.int64
    assert vocabulary.d2t.tolist() == [1, 1, 3, 6]
    assert np.flatnonzero(vocabulary.t2d).tolist() == [1, 2, 5, 9]
    assert vocabulary.t2d.shape == (12,) and vocabulary.t2d.dtype == bool
    assert vocabulary.size == 4


def test_coverage_is_a_share_of_the_counted_tokens():
    vocabulary = DraftVocabulary(np.array([0, 3]), 5)
    assert vocabulary.coverage(np.array([6, 1, 1, 2, 0])) == 0.8
    with pytest.raises(VocabularyError, match="no tokens are counted"):
        vocabulary.coverage(np.zeros(5, np.int64))


def test_offsets_make_the_same_vocabulary_again():
    vocabulary = DraftVocabulary(np.array([1, 2, 5, 9]), 12)
    for t2d in (None, vocabulary.t2d):
        again = DraftVocabulary.from_offsets(vocabulary.d2t, 12, t2d)
        assert again.draft_to_target.tolist() == [1, 2, 5, 9]
    # Without two neighbours the offsets ascend like ids do, and t2d tells which they are.
    sparse = DraftVocabulary(np.array([1, 3, 6]), 12)
    again = DraftVocabulary.from_offsets(sparse.d2t, 12, sparse.t2d)
    assert again.draft_to_target.tolist() == [1, 3, 6]


def test_absolute_ids_in_place_of_offsets_are_named():
    ids = np.array([1, 2, 5, 9])
    mask = DraftVocabulary(ids, 40).t2d
    for V, t2d in ((12, None), (40, None), (40, mask)):
        with pytest.raises(VocabularyError, match="absolute target ids, not offsets"):
            DraftVocabulary.from_offsets(ids, V, t2d)
    with pytest.raises(VocabularyError, match="absolute target ids"):
        DraftVocabulary.from_offsets(np.arange(6), 6)


@pytest.mark.parametrize(
    ("d2t", "t2d", "message"),
    [
        ([0, 0, 9], None, "target ids from 0 to 11; the target knows 0 to 9"),
        ([-1, 0, 0], None, "target ids from -1 to 2"),
        ([3, 2, 2], None, "draft token 0 is 3, draft token 1 is 3"),
        ([0, 0, 1], [1, 1, 1, 0, 0], "t2d marks other tokens"),
        ([], None, "is a list of target ids"),
    ],
)
def test_offsets_that_lead_nowhere_are_an_error(d2t, t2d, message):
    with pytest.raises(VocabularyError, match=message):
        DraftVocabulary.from_offsets(np.array(d2t, np.int64), 10, t2d)


def test_a_vocabulary_is_written_and_read_again(tmp_path):
    path = tmp_path / "run" / "vocabulary.json"
    DraftVocabulary(np.array([1, 2, 5, 9]), 12).save(path)
    DraftVocabulary(np.array([1, 2, 5]), 12).save(path)  # replaces it
    loaded = DraftVocabulary.load(path)
    assert (loaded.draft_to_target.tolist(), loaded.target_vocab_size) == ([1, 2, 5], 12)
    assert [p.name for p in path.parent.iterdir()] == ["vocabulary.json"]


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"target_vocab_size": 3}', json.dumps({"draft_to_target": [1]})]
)
def test_a_file_that_is_no_vocabulary_is_named(tmp_path, content):
    path = tmp_path / "vocabulary.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(VocabularyError, match=r"vocabulary\.json is no draft vocabulary"):
        DraftVocabulary.load(path)


@pytest.mark.parametrize(
    ("required", "size", "message"),
    [
        ([8], 3, "not all in the target's vocabulary of 8"),
        ([-1], 3, "not all in the target's vocabulary"),
        ([1, 2, 3, 4], 3, "draft_vocab_size=3 is smaller than .* special tokens .*, 4; raise it"),
    ],
)
def test_required_tokens_that_cannot_be_in_are_an_error(required, size, message):
    with pytest.raises(VocabularyError, match=message):
        select(np.arange(8), required, size)


def test_a_set_without_assistant_tokens_gives_no_vocabulary():
    with pytest.raises(VocabularyError, match="no assistant token is counted"):
        select(np.zeros(8, np.int64), [1], 3)
