"""The rollout trains exactly what serving does.

Serving is replayed with KV caches: prefill, draft k tokens, verify, accept some, go on. Every
evaluation of the head in it has a position i and a step k. Its logits must be those of the rollout
at (i, k), which they are only if aux hidden state, token, rotary position and visible keys agree.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import assert_same_replies, decode, decode_spec
from models import CAPTURE, random_head, random_target, tiny_dims, tiny_head_dims

from MaxDraft.decoding.acceptance import accept_sampled
from MaxDraft.decoding.state import DecodeParams
from MaxDraft.decoding.target_model import CachedContext, TargetModel
from MaxDraft.drafts.alignment import loss_mask
from MaxDraft.drafts.drafter import DraftInputs
from MaxDraft.drafts.eagle3 import decoding as eagle3_decoding
from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.drafts.eagle3.rollout import rollout_everywhere
from MaxDraft.layers.attention import slots_up_to
from MaxDraft.targets import decoder

TARGET = tiny_dims()
HEAD = tiny_head_dims(TARGET, draft_vocab_size=7)
DRAFT_TO_TARGET = jnp.array([0, 1, 3, 4, 7, 9, 11], jnp.int32)


@pytest.fixture(scope="module")
def pair():
    return random_target(TARGET), random_head(HEAD)


def rollout_logits(target_params, head_params, tokens, steps):
    """float32 [K, T, D]: the head's logits at every position and step of one document."""
    tokens = jnp.asarray(tokens, jnp.int32)[None]
    return np.asarray(_rollout_logits(target_params, head_params, tokens, steps))


@functools.partial(jax.jit, static_argnums=3)
def _rollout_logits(target_params, head_params, tokens, steps):
    positions = jnp.arange(tokens.shape[1])[None]
    segments = jnp.ones_like(tokens)
    embeddings, aux_hidden_states, _ = decoder.forward(
        target_params, tokens, positions, segments, TARGET, CAPTURE, jnp.float32, block=8
    )
    inputs = DraftInputs.from_rows(embeddings, aux_hidden_states, positions, segments)
    states = rollout_everywhere(head_params, HEAD, inputs, steps, block=8)
    return jnp.stack([eagle3.logits(head_params, HEAD, state) for state in states])


@pytest.mark.parametrize("acceptance", ["none", "some", "all"])
def test_serving_evaluates_trained_positions_and_steps_only(pair, acceptance):
    target_params, head_params = pair
    rng = np.random.default_rng(0)
    steps, start, end, length = 4, 9, 33, 40  # the reply is x[9..32]
    tokens = rng.integers(0, TARGET.vocab_size, length)
    trained = rollout_logits(target_params, head_params, tokens, steps)
    turn_ids = np.zeros((1, length), np.int32)
    turn_ids[0, start:end] = 1
    supervised = np.asarray(
        loss_mask(jnp.asarray(turn_ids), jnp.ones((1, length), jnp.int32), steps, "serving")
    )[:, 0]

    target = TargetModel(TARGET, CAPTURE, jnp.float32)
    num_slots = length + steps + 1
    cache = target.empty_cache(1, num_slots)
    head_cache = eagle3_decoding.empty_cache(HEAD, 1, num_slots, jnp.float32)

    def embed(ids):
        return decoder.embed(target_params, jnp.asarray(ids, jnp.int32), jnp.float32)

    @jax.jit
    def read(read_tokens, next_tokens, rows, cache, head_cache):
        """The target reads tokens, the head reads the same positions."""
        context = CachedContext.from_chain(rows, num_slots)
        aux_hidden_states, _, cache = target.extend(target_params, cache, read_tokens, context)
        states, head_cache = eagle3_decoding.absorb(
            head_params,
            HEAD,
            head_cache,
            embed(next_tokens),
            aux_hidden_states,
            rows,
            rows,
            context.visible,
        )
        return states[:, -1], cache, head_cache

    @jax.jit
    def chain_logits(state, chain, row, head_cache):
        """The logits [K, D] of a chain whose drafts are `chain` [K], whatever the head prefers."""
        logits = []

        def choose(step, scores):
            logits.append(scores[0])
            return chain[step][None], None

        slot = row[None] + 1
        _, _, head_cache = eagle3_decoding.draft(
            head_params,
            HEAD,
            head_cache,
            embed=embed,
            state=state,
            token=chain[:1],
            slots=slot,
            positions=slot,
            visible=slots_up_to(row[None], num_slots),
            choose=choose,
            num_draft_tokens=steps,
        )
        return jnp.stack(logits), head_cache

    def rows_read(first, last):
        rows = np.arange(first, last + 1)[None]
        return jnp.asarray(tokens[rows], jnp.int32), jnp.asarray(tokens[rows + 1], jnp.int32), rows

    visited = np.zeros_like(supervised)
    state, cache, head_cache = read(*rows_read(0, start - 1), cache, head_cache)
    row = start - 1
    while row + 2 < end:  # there is still a token to draft
        chain = np.resize(tokens[row + 2 : end], steps).astype(np.int32)
        logits, chain_cache = chain_logits(state, chain, jnp.int32(row), head_cache)
        for k in range(min(steps, end - row - 2)):
            visited[k, row] = True
            np.testing.assert_allclose(logits[k], trained[k, row], rtol=1e-4, atol=1e-4)
        accepted = {"none": 0, "some": int(rng.integers(0, steps + 1)), "all": steps}[acceptance]
        accepted = min(accepted, end - row - 3)
        # The drafted keys stay in the cache, as in serving, and are written over.
        state, cache, head_cache = read(*rows_read(row + 1, row + 1 + accepted), cache, chain_cache)
        row += 1 + accepted

    assert not (visited & ~supervised).any()
    if acceptance == "none":  # then serving stands at every position once
        assert (visited == supervised).all()


def greedy_chain(target_params, head_params, committed, steps):
    """The chain that is drafted after `committed`, from whole-sequence passes without caches."""
    tokens = list(committed)
    for k in range(steps):
        # Pads past the end: causal attention never sees them, and shapes stay the same.
        padded = tokens + [0] * (64 - len(tokens))
        logits = rollout_logits(target_params, head_params, padded, steps)
        draft = int(DRAFT_TO_TARGET[logits[k, len(committed) - 2].argmax()])
        tokens.append(draft)
    return tokens[len(committed) :]


def test_rounds_are_those_of_whole_sequence_passes(pair):
    target_params, head_params = pair
    steps, new_tokens, stop = 3, 24, (5,)
    prompts = np.random.default_rng(1).integers(0, TARGET.vocab_size, (2, 11)).astype(np.int32)
    lengths = np.array([11, 7], np.int32)
    spec = decode_spec(
        TARGET, CAPTURE, HEAD, num_draft_tokens=steps, max_new_tokens=new_tokens, stop_ids=stop
    )
    params = DecodeParams(target_params, head_params, DRAFT_TO_TARGET)
    reply = decode(spec, params, prompts, lengths)

    @jax.jit
    def target_argmax(tokens):
        ones = jnp.ones_like(tokens)
        _, _, last = decoder.forward(
            target_params, tokens, jnp.arange(64)[None], ones, TARGET, CAPTURE, jnp.float32, 64
        )
        return jnp.argmax(decoder.logits(target_params, TARGET, last)[0], -1)

    for prompt, length, tokens, count, verify_steps, accepted in zip(
        prompts,
        lengths,
        reply.tokens,
        reply.length,
        reply.verify_steps,
        reply.accepted_drafts,
        strict=True,
    ):

        def best(text):
            padded = np.array(text + [0] * (64 - len(text)), np.int32)[None]
            return np.asarray(target_argmax(padded))

        text = prompt[:length].tolist()
        text.append(int(best(text)[len(text) - 1]))
        rounds, histogram = 0, np.zeros(steps, int)
        while len(text) - length < new_tokens and text[-1] not in stop:
            drafts = greedy_chain(target_params, head_params, text, steps)
            choice = best(text + drafts)[len(text) - 1 :][: steps + 1]
            kept = 0
            while kept < steps and drafts[kept] == choice[kept]:
                kept += 1
            histogram[:kept] += 1
            rounds += 1
            for token in choice[: kept + 1].tolist():
                if len(text) - length < new_tokens and text[-1] not in stop:
                    text.append(token)
        assert tokens[:count].tolist() == text[length:]
        assert int(verify_steps) == rounds
        assert accepted.tolist() == histogram.tolist()


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 5])
def test_greedy_speculative_output_equals_plain_output(pair, num_draft_tokens):
    prompts = np.random.default_rng(2).integers(0, TARGET.vocab_size, (4, 9)).astype(np.int32)
    lengths = np.array([9, 3, 6, 1], np.int32)
    spec = decode_spec(
        TARGET,
        CAPTURE,
        HEAD,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=30,
        stop_ids=(2, 5),
    )
    params = DecodeParams(*pair, DRAFT_TO_TARGET)
    plain = decode(spec.without_drafts(), params, prompts, lengths)
    assert_same_replies(plain, decode(spec, params, prompts, lengths))
    np.testing.assert_array_equal(plain.verify_steps, plain.length - 1)
    assert len(set(plain.length.tolist())) > 1  # some stopped early, some ran on


def test_rejection_sampling_keeps_the_targets_distribution():
    # One draft from a q unlike p, twice as many tokens as q has: over many draws the first
    # committed token must follow p, and the second, after an acceptance, p of its own position.
    rng = np.random.default_rng(3)
    vocab, draws = 8, 200_000
    p = rng.dirichlet(np.ones(vocab), 2)
    q = rng.dirichlet(np.ones(vocab), 1)
    q[:, 4:] = 0.0
    q /= q.sum()
    drafts = rng.choice(vocab, size=(draws, 1), p=q[0]).astype(np.int32)
    accepted, tokens = jax.jit(accept_sampled)(
        jax.random.split(jax.random.key(0), draws),
        jnp.asarray(drafts),
        jnp.broadcast_to(jnp.asarray(q, jnp.float32), (draws, 1, vocab)),
        jnp.broadcast_to(jnp.asarray(p, jnp.float32), (draws, 2, vocab)),
    )
    accepted, tokens = np.asarray(accepted), np.asarray(tokens)

    def check(sample, expected):  # five standard deviations of a binomial share
        share = np.bincount(sample, minlength=vocab) / len(sample)
        assert (abs(share - expected) < 5 * np.sqrt(expected / len(sample))).all()

    check(tokens[:, 0], p[0])
    check(tokens[accepted == 1, 1], p[1])
    # The rate of acceptance is sum min(p, q).
    rate = np.minimum(p[0], q[0]).sum()
    assert abs(accepted.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize("drafts", [0, 2])
def test_sampled_decoding_follows_the_targets_distribution(pair, drafts):
    # Two new tokens at temperature 0.7, many samples: the pair's distribution is the target's.
    target_params, _ = pair
    prompt, draws, temperature = np.array([3, 8, 1, 4], np.int32), 20_000, 0.7
    spec = decode_spec(
        TARGET,
        CAPTURE,
        HEAD,
        num_draft_tokens=2,
        max_new_tokens=2,
        stop_ids=(99,),
        temperature=temperature,
    )
    reply = decode(
        spec if drafts else spec.without_drafts(),
        DecodeParams(*pair, DRAFT_TO_TARGET),
        np.tile(prompt, (draws, 1)),
        np.full(draws, 4, np.int32),
        seed=5,
    )

    def distribution(text):
        tokens = jnp.asarray(text, jnp.int32)[None]
        _, _, last = decoder.forward(
            target_params,
            tokens,
            jnp.arange(len(text))[None],
            jnp.ones_like(tokens),
            TARGET,
            CAPTURE,
            jnp.float32,
            16,
        )
        logits = np.asarray(decoder.logits(target_params, TARGET, last))[0, -1] / temperature
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    first = distribution(prompt.tolist())
    expected = np.array(
        [first[a] * distribution([*prompt.tolist(), a]) for a in range(TARGET.vocab_size)]
    )
    share = np.zeros_like(expected)
    np.add.at(share, tuple(np.asarray(reply.tokens).T), 1 / draws)
    assert (abs(share - expected) < 5 * np.sqrt(expected / draws) + 1e-4).all()
