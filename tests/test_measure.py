"""How decoding is measured: what is pooled, what is compared, what a repetition is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import decode_spec
from models import CAPTURE, random_head, random_target, tiny_dims, tiny_head_dims

from MaxDraft.decoding import measure
from MaxDraft.decoding.generate import grow
from MaxDraft.decoding.prompts import DecodedPrompts, prompt_batches
from MaxDraft.decoding.state import Acceptance, DecodeParams, DecodeState, Reply
from MaxDraft.decoding.target_model import CachedContext
from MaxDraft.targets import decoder

TARGET = tiny_dims()
HEAD = tiny_head_dims(TARGET, draft_vocab_size=12)


def decoded(replies, verify_steps, accepted_drafts, seconds=1.0):
    return DecodedPrompts(replies, seconds, verify_steps, np.array(accepted_drafts))


def test_accept_length_pools_over_all_prompts():
    # 9 tokens after the first one in 3 steps, 1 token in 1 step: 10 / 4, not (3 + 1) / 2.
    found = decoded([[5] * 10, [5] * 2], 4, [3, 2, 1], seconds=2.0)
    assert found.accept_length == 2.5
    assert found.tokens_per_second == 6.0
    assert found.accepted_by_draft_step == [0.75, 0.5, 0.25]
    assert found.accept_length_engine == 2.5  # nothing was accepted behind the end of a reply


def test_replies_of_one_token_have_no_accept_length():
    found = decoded([[5]], 0, [0, 0, 0])
    assert found.accept_length == found.accept_length_engine == 0.0


def always_right(reply_length, spec, stop_at=None):
    """A reply whose drafts are all accepted, grown round by round as generate() does it."""
    text = np.ones(reply_length + 8, np.int32)
    if stop_at is not None:
        text[stop_at] = spec.stop_ids[0]
    one = jnp.ones(1, jnp.int32)
    reply = Reply(
        tokens=jnp.zeros((1, spec.max_new_tokens), jnp.int32).at[:, 0].set(text[0]),
        length=one,
        verify_steps=0 * one,
        accepted_drafts=jnp.zeros((1, spec.num_draft_tokens), jnp.int32),
    )
    active = jnp.ones(1, bool)
    while active.any():
        start = int(reply.length[0])
        state = DecodeState(None, one, reply, active, (), (), (), num_slots=0)
        tokens = jnp.asarray(text[None, start : start + spec.num_draft_tokens + 1])
        reply, active = grow(spec, state, Acceptance(one * spec.num_draft_tokens, tokens))
    tokens = reply.tokens[0, : int(reply.length[0])].tolist()
    assert tokens == text[: len(tokens)].tolist()
    return decoded([tokens], int(reply.verify_steps[0]), np.asarray(reply.accepted_drafts[0]))


@pytest.mark.parametrize(
    ("max_new_tokens", "stop_at", "ours"),
    [
        (49, None, 4.0),  # 48 tokens after the first, in 12 steps of 4
        (48, None, 47 / 12),  # the last step's last token does not fit
        (46, None, 45 / 12),
        (49, 5, 5 / 2),  # the stop token is the first of the second step
    ],
)
def test_a_perfect_drafter_in_both_countings(max_new_tokens, stop_at, ours):
    spec = decode_spec(TARGET, CAPTURE, HEAD, max_new_tokens=max_new_tokens)
    found = always_right(max_new_tokens, spec, stop_at)
    assert found.accept_length == pytest.approx(ours)
    assert found.accept_length_engine == 4.0


def test_repetition_is_counted_inside_each_reply():
    assert measure.distinct_ngram_share([[1, 2, 3, 4, 5, 6]], 4) == 1.0
    assert measure.distinct_ngram_share([[1, 2] * 50], 4) == pytest.approx(2 / 97)
    assert measure.distinct_ngram_share([[1, 2, 3, 4], [1, 2, 3, 4]], 4) == 1.0
    assert measure.distinct_ngram_share([[1, 2]], 4) == 1.0


def test_the_last_batch_is_filled_up_with_the_last_prompt():
    batches = list(prompt_batches([[1, 2, 3], [4, 5], [6]], 2))
    assert [numbers.tolist() for *_, numbers in batches] == [[0, 1], [2, 2]]
    assert [lengths.tolist() for _, lengths, _ in batches] == [[3, 2], [1, 1]]
    assert batches[0][0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batches[1][0].tolist() == [[6, 0, 0], [6, 0, 0]]


@pytest.fixture(scope="module")
def one_at_a_time():
    return measured(batch_size=1)


def measured(batch_size):
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 0, 2]]
    result = measure.measure(
        decode_spec(TARGET, CAPTURE, HEAD, max_new_tokens=8, temperature=1.0),
        DecodeParams(random_target(TARGET), random_head(HEAD), jnp.arange(12, dtype=jnp.int32)),
        random_head(HEAD, seed=2),
        prompts,
        batch_size,
        lambda _: None,
    )
    return {key: x for key, x in result.items() if key not in ("tokens_per_second", "speedup")}


def test_what_is_measured_is_consistent(one_at_a_time):
    result = one_at_a_time
    assert result["lossless"] is True
    assert result["unequal_replies"] == []
    assert result["prompts"] == 5
    assert 1.0 <= result["accept_length"] <= result["accept_length_engine"] <= 4.0
    assert result["accept_length_engine"] == pytest.approx(
        1 + sum(result["accepted_by_draft_step"])
    )
    assert result["sampled"]["temperature"] == 1.0


@pytest.mark.parametrize("batch_size", [2, 8])
def test_the_batch_size_changes_no_number(one_at_a_time, batch_size):
    assert measured(batch_size) == one_at_a_time  # the sampled replies included


def test_where_replies_part_is_reported_with_the_logit_gap():
    spec = decode_spec(TARGET, CAPTURE, HEAD)
    params = DecodeParams(random_target(TARGET))
    found = measure.first_difference(spec, params, 3, [1, 2, 3], [4, 5, 6], [4, 5, 7])
    text = jnp.array([[1, 2, 3, 4, 5]])
    _, last, _ = jax.jit(spec.target.extend)(
        params.target,
        spec.target.empty_cache(1, 5),
        text,
        CachedContext.from_chain(jnp.arange(5)[None], 5),
    )
    logits = decoder.logits(params.target, TARGET, last)[0, -1]
    assert (found["prompt"], found["token"]) == (3, 2)
    assert found["logit_gap"] == pytest.approx(float(logits[6] - logits[7]), rel=1e-5)


def test_a_longer_reply_is_unequal_at_the_others_end():
    spec = decode_spec(TARGET, CAPTURE, HEAD)
    params = DecodeParams(random_target(TARGET))
    found = measure.first_difference(spec, params, 0, [1], [4, 5], [4, 5, 7])
    assert found == {"prompt": 0, "token": 2}
