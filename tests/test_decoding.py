"""Rounds of propose, verify, accept and commit, with a drafter of any kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import assert_same_replies, decode, decode_spec
from models import CAPTURE, random_head, random_target, tiny_dims, tiny_head_dims

from MaxDraft.decoding.generate import decode_round, prefill
from MaxDraft.decoding.prompts import compile_decode, decode_prompts
from MaxDraft.decoding.state import DecodeParams

TARGET = tiny_dims()
HEAD = tiny_head_dims(TARGET, draft_vocab_size=12)
PROMPTS = np.random.default_rng(2).integers(0, TARGET.vocab_size, (4, 9)).astype(np.int32)
LENGTHS = np.array([9, 3, 6, 1], np.int32)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Drafts a block of tokens at once, without a state: the token after position p is table[p]."""

    def empty_cache(self, batch, slots, dtype):
        return ()

    def absorb(self, params, cache, *rows):
        return (), cache

    def draft(self, params, cache, *, positions, num_draft_tokens, **request):
        places = positions[:, None] + jnp.arange(num_draft_tokens)
        return jnp.take_along_axis(params, places, 1), None, cache


def oracle_of(spec, params, prompts, lengths):
    """A spec and params with a drafter that is right about every greedy token."""
    endless = dataclasses.replace(spec, stop_ids=(99,), max_new_tokens=spec.max_new_tokens + 8)
    replies = decode(endless.without_drafts(), params, prompts, lengths).tokens
    table = np.zeros((len(prompts), prompts.shape[1] + replies.shape[1]), np.int32)
    for row, length in enumerate(lengths):
        table[row, length - 1 : length - 1 + replies.shape[1]] = replies[row]
    return dataclasses.replace(spec, drafter=Oracle()), DecodeParams(params.target, table)


@pytest.fixture(scope="module")
def params():
    return DecodeParams(random_target(TARGET), random_head(HEAD), jnp.arange(12))


@pytest.mark.parametrize(("new_tokens", "ours"), [(48, 47 / 12), (49, 4.0)])
def test_a_perfect_drafter_reads_4_as_engines_count(params, new_tokens, ours):
    spec = decode_spec(TARGET, CAPTURE, HEAD, max_new_tokens=new_tokens, stop_ids=(99,))
    prompt = PROMPTS[:1].tolist()
    oracle, table = oracle_of(spec, params, PROMPTS[:1], LENGTHS[:1])
    found = decode_prompts(compile_decode(oracle), table, prompt, 1)
    assert found.accept_length == pytest.approx(ours)
    assert found.accept_length_engine == 4.0
    assert found.verify_steps == 12
    assert found.accepted_drafts.tolist() == [12, 12, 12]


def test_a_drafter_without_states_or_cache_changes_no_reply(params):
    spec = decode_spec(TARGET, CAPTURE, HEAD, max_new_tokens=20, num_draft_tokens=5)
    oracle, table = oracle_of(spec, params, PROMPTS, LENGTHS)
    plain = decode(spec.without_drafts(), params, PROMPTS, LENGTHS)
    drafted = decode(oracle, table, PROMPTS, LENGTHS)
    assert_same_replies(plain, drafted)
    np.testing.assert_array_equal(drafted.verify_steps, -(-(plain.length - 1) // 6))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_draft_vocabulary_means_the_whole_one(params, temperature):
    spec = decode_spec(TARGET, CAPTURE, HEAD, temperature=temperature)
    whole = dataclasses.replace(params, draft_to_target=None)
    a, b = (decode(spec, p, PROMPTS, LENGTHS) for p in (params, whole))
    assert_same_replies(a, b)
    np.testing.assert_array_equal(a.accepted_drafts, b.accepted_drafts)
    assert a.accepted_drafts.sum() > 0


def test_a_round_commits_the_accepted_drafts_and_one_token(params):
    spec = decode_spec(TARGET, CAPTURE, HEAD, stop_ids=(99,), max_new_tokens=40)
    keys = jax.random.split(jax.random.key(0), 4)
    state = jax.jit(functools.partial(prefill, spec))(params, PROMPTS, LENGTHS, keys)
    step = jax.jit(functools.partial(decode_round, spec))
    for _ in range(6):
        before, state = state, step(params, state)
        accepted = (state.reply.accepted_drafts - before.reply.accepted_drafts).sum(1)
        np.testing.assert_array_equal(state.num_committed - before.num_committed, accepted + 1)
        for row, length in enumerate(before.reply.length):
            assert (state.reply.tokens[row, :length] == before.reply.tokens[row, :length]).all()
    np.testing.assert_array_equal(state.reply.verify_steps, 6)
