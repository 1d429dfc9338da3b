"""How decoding is measured: what is pooled, what is compared, what a repetition is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CAPTURE, random_head, random_target, tiny_dims, tiny_head_dims

from MaxDraft.decoding import measure
from MaxDraft.decoding.generate import TargetModel
from MaxDraft.decoding.speculative import DraftModel
from MaxDraft.targets import decoder

TARGET = tiny_dims()
HEAD = tiny_head_dims(TARGET, draft_vocab_size=12)


def test_accept_length_pools_tokens_and_verify_steps_over_all_prompts():
    # 9 tokens after the first one in 3 steps, 1 token in 1 step: 10 / 4, not (3 + 1) / 2.
    found = measure.Pass([[5] * 10, [5] * 2], 2.0, verify_steps=4, accepted=np.array([3, 2, 1]))
    assert found.accept_length == 2.5
    assert found.tokens_per_second == 6.0


def test_replies_that_end_with_their_first_token_have_no_accept_length():
    assert measure.Pass([[5]], 1.0, verify_steps=0, accepted=np.zeros(3)).accept_length == 0.0


def test_repetition_is_counted_inside_each_reply():
    assert measure.distinct_ngram_share([[1, 2, 3, 4, 5, 6]], 4) == 1.0
    assert measure.distinct_ngram_share([[1, 2] * 50], 4) == pytest.approx(2 / 97)
    assert measure.distinct_ngram_share([[1, 2, 3, 4], [1, 2, 3, 4]], 4) == 1.0
    assert measure.distinct_ngram_share([[1, 2]], 4) == 1.0


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_prompt_is_decoded_whatever_the_batch_size(batch_size):
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 0, 2]]
    result = measure.measure(
        TargetModel(TARGET, CAPTURE, jnp.float32),
        DraftModel(HEAD, jnp.float32),
        random_target(TARGET),
        random_head(HEAD),
        random_head(HEAD, seed=2),
        jnp.arange(12, dtype=jnp.int32),
        prompts,
        measure.DecodeSettings(3, 8, 1.0, batch_size, (5,)),
        lambda _: None,
    )
    assert result["lossless"] is True
    assert result["unequal_replies"] == []
    assert result["prompts"] == 5
    assert 1.0 <= result["accept_length"] <= 4.0
    assert result["speedup"] > 0
    assert result["sampled"]["temperature"] == 1.0


def test_where_replies_part_is_reported_with_the_targets_preference():
    target = TargetModel(TARGET, CAPTURE, jnp.float32)
    params = random_target(TARGET)
    found = measure._first_difference(target, params, 3, [1, 2, 3], [4, 5, 6], [4, 5, 7])
    text = jnp.array([[1, 2, 3, 4, 5]])
    _, last, _ = jax.jit(target.extend)(params, target.empty_cache(1, 5), text, jnp.arange(5)[None])
    logits = decoder.logits(params, TARGET, last)[0, -1]
    assert (found["prompt"], found["token"]) == (3, 2)
    assert found["logit_gap"] == pytest.approx(float(logits[6] - logits[7]), rel=1e-5)


def test_a_reply_that_is_longer_than_the_other_is_unequal_at_the_others_end():
    target = TargetModel(TARGET, CAPTURE, jnp.float32)
    found = measure._first_difference(target, random_target(TARGET), 0, [1], [4, 5], [4, 5, 7])
    assert found == {"prompt": 0, "token": 2}
