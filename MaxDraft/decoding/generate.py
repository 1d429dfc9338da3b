"""Speculative decoding: rounds of propose, verify, accept, commit.

With x[0..n-1] committed, the target and the drafter have read all but x[n-1]. One round:

    propose   the drafter proposes d_1..d_gamma to follow x[n-1]
    verify    the target reads x[n-1], d_1..d_gamma in one pass: gamma + 1 distributions
    accept    the first a drafts stay, and the target adds one token of its own
    commit    the reply grows by these a + 1 tokens, and the drafter reads positions n-1..n+a-1
              with the target's aux hidden states

Decoding without drafts is the case gamma = 0. Slots hold the text in order: x[i] lies in slot i,
drafts in the slots from n on, where the next round writes over those that were refused.

B batch, P prompt length (padded on the right), gamma drafts (Leviathan et al. 2023),
H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft.decoding.acceptance import (
    accept_greedy,
    accept_sampled,
    choose_token,
    fold_in,
    probabilities,
)
from MaxDraft.decoding.state import (
    Acceptance,
    DecodeParams,
    DecodeSpec,
    DecodeState,
    Proposal,
    Reply,
    Verification,
)
from MaxDraft.decoding.target_model import CachedContext
from MaxDraft.layers.attention import read_slots, slots_up_to
from MaxDraft.targets import decoder


def generate(
    spec: DecodeSpec,
    params: DecodeParams,
    prompt: jax.Array,  # int32 [B, P]
    prompt_length: jax.Array,  # int32 [B]
    keys: jax.Array,  # [B] random keys; a reply depends on its own key alone
) -> Reply:
    """Replies that the target would give alone: the same tokens at temperature 0, the same
    distribution above it.
    """
    state = jax.lax.while_loop(
        lambda state: state.active.any(),
        lambda state: decode_round(spec, params, state),
        prefill(spec, params, prompt, prompt_length, keys),
    )
    return state.reply


def decode_round(spec: DecodeSpec, params: DecodeParams, state: DecodeState) -> DecodeState:
    """One pass of the target: every active reply grows by at least one token."""
    proposal = propose(spec, params, state)
    verification = verify(spec, params, state, proposal)
    acceptance = accept(spec, state, proposal, verification)
    return commit(spec, params, state, proposal, verification, acceptance)


def prefill(
    spec: DecodeSpec,
    params: DecodeParams,
    prompt: jax.Array,  # int32 [B, P]
    prompt_length: jax.Array,  # int32 [B]
    keys: jax.Array,  # [B]
) -> DecodeState:
    """The target reads the prompt and gives the reply's first token; the drafter reads the prompt.

    A slot past the prompt's end is written before any token sees it, so the padding is never seen.
    """
    (batch, width), num_drafts = prompt.shape, spec.num_draft_tokens
    num_slots = width + spec.max_new_tokens + num_drafts + 1
    context = CachedContext.from_chain(
        jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompt.shape), num_slots
    )
    target_cache = spec.target.empty_cache(batch, num_slots)
    aux_hidden_states, last_hidden_state, target_cache = spec.target.extend(
        params.target, target_cache, prompt, context
    )
    logits = _target_logits(spec, params, read_slots(last_hidden_state, prompt_length - 1))
    first = choose_token(fold_in(keys, 0), logits, spec.temperature)

    next_tokens = jnp.where(
        jnp.arange(width) == (prompt_length - 1)[:, None], first[:, None], jnp.roll(prompt, -1, 1)
    )
    drafter_states, drafter_cache = spec.drafter.absorb(
        params.drafter,
        spec.drafter.empty_cache(batch, num_slots, spec.target.dtype),
        spec.target.embed(params.target, next_tokens),
        aux_hidden_states,
        context.slots,
        context.positions,
        context.visible,
    )
    length = jnp.ones(batch, jnp.int32)
    return DecodeState(
        keys=keys,
        prompt_length=prompt_length,
        reply=Reply(
            tokens=jnp.zeros((batch, spec.max_new_tokens), jnp.int32).at[:, 0].set(first),
            length=length,
            verify_steps=jnp.zeros(batch, jnp.int32),
            accepted_drafts=jnp.zeros((batch, num_drafts), jnp.int32),
        ),
        active=~_is_stop(spec, first) & (length < spec.max_new_tokens),
        target_cache=target_cache,
        drafter_cache=drafter_cache,
        drafter_state=_at(drafter_states, prompt_length - 1),
        num_slots=num_slots,
    )


def propose(spec: DecodeSpec, params: DecodeParams, state: DecodeState) -> Proposal:
    """The drafter proposes gamma tokens after x[n-1]."""
    keys, _ = state.round_keys
    last = state.num_committed - 1

    def choose(step: int, logits: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        tokens = choose_token(fold_in(keys, step), logits, spec.temperature)
        ids, distribution = params.draft_to_target, None
        if spec.temperature > 0:
            distribution = probabilities(logits, spec.temperature)
            if ids is not None:
                whole = jnp.zeros((len(logits), spec.target.dims.vocab_size), jnp.float32)
                distribution = whole.at[:, ids].set(distribution)
        return tokens if ids is None else ids[tokens], distribution

    return Proposal(
        *spec.drafter.draft(
            params.drafter,
            state.drafter_cache,
            embed=functools.partial(spec.target.embed, params.target),
            state=state.drafter_state,
            token=state.last_token,
            slots=last,
            positions=last,
            visible=slots_up_to(last - 1, state.num_slots),
            choose=choose,
            num_draft_tokens=spec.num_draft_tokens,
            recurrent_position_offset=spec.recurrent_position_offset,
        )
    )


def verify(
    spec: DecodeSpec, params: DecodeParams, state: DecodeState, proposal: Proposal
) -> Verification:
    """The target reads x[n-1] and the drafts in one pass."""
    tokens = jnp.concatenate([state.last_token[:, None], proposal.tokens], axis=1)
    positions = (state.num_committed - 1)[:, None] + jnp.arange(tokens.shape[1])
    context = CachedContext.from_chain(positions, state.num_slots)
    aux_hidden_states, last_hidden_state, cache = spec.target.extend(
        params.target, state.target_cache, tokens, context
    )
    logits = _target_logits(spec, params, last_hidden_state)
    return Verification(context, aux_hidden_states, logits, cache)


def accept(
    spec: DecodeSpec, state: DecodeState, proposal: Proposal, verification: Verification
) -> Acceptance:
    """The rule of the temperature, see acceptance.py."""
    if spec.temperature == 0:
        return Acceptance(*accept_greedy(proposal.tokens, verification.logits))
    _, keys = state.round_keys
    p = probabilities(verification.logits, spec.temperature)
    # gamma = 0: nothing was drafted, and q is empty.
    q = p[:, :0] if proposal.distributions is None else proposal.distributions
    return Acceptance(*accept_sampled(keys, proposal.tokens, q, p))


def commit(
    spec: DecodeSpec,
    params: DecodeParams,
    state: DecodeState,
    proposal: Proposal,
    verification: Verification,
    acceptance: Acceptance,
) -> DecodeState:
    """The accepted tokens join the reply; the drafter reads their positions."""
    context = verification.context
    drafter_states, drafter_cache = spec.drafter.absorb(
        params.drafter,
        proposal.drafter_cache,
        spec.target.embed(params.target, acceptance.tokens),
        verification.aux_hidden_states,
        context.slots,
        context.positions,
        context.visible,
    )
    reply, active = grow(spec, state, acceptance)
    return dataclasses.replace(
        state,
        reply=reply,
        active=active,
        target_cache=verification.target_cache,
        drafter_cache=drafter_cache,
        drafter_state=_at(drafter_states, acceptance.num_accepted),
    )


def grow(spec: DecodeSpec, state: DecodeState, acceptance: Acceptance) -> tuple[Reply, jax.Array]:
    """The reply with its new tokens, and whether it goes on.

    A reply ends with its first stop token, or at max_new_tokens. What was accepted past that end is
    counted in accepted_drafts, but is not part of the reply.
    """
    reply, tokens = state.reply, acceptance.tokens
    place = jnp.arange(tokens.shape[1])
    committed = place <= acceptance.num_accepted[:, None]
    stops = _is_stop(spec, tokens) & committed
    before_stop = jnp.cumsum(stops, axis=1) - stops == 0
    fits = place < (spec.max_new_tokens - reply.length)[:, None]
    emitted = state.active[:, None] & committed & before_stop & fits
    # Tokens that are not emitted get a place outside the array, where a write is dropped.
    places = jnp.where(emitted, reply.length[:, None] + place, spec.max_new_tokens)
    write = jax.vmap(lambda old, index, new: old.at[index].set(new, mode="drop"))
    accepted = state.active[:, None] & (place[:-1] < acceptance.num_accepted[:, None])
    length = reply.length + emitted.sum(1)
    grown = Reply(
        tokens=write(reply.tokens, places, tokens),
        length=length,
        verify_steps=reply.verify_steps + state.active,
        accepted_drafts=reply.accepted_drafts + accepted,
    )
    ended = (emitted & stops).any(1) | (length >= spec.max_new_tokens)
    return grown, state.active & ~ended


def _target_logits(
    spec: DecodeSpec, params: DecodeParams, last_hidden_state: jax.Array
) -> jax.Array:
    return decoder.logits(params.target, spec.target.dims, last_hidden_state)


def _is_stop(spec: DecodeSpec, tokens: jax.Array) -> jax.Array:
    """bool like tokens: whether a token ends a reply."""
    return jnp.isin(tokens, jnp.asarray(spec.stop_ids, jnp.int32))


def _at(states: Any, index: jax.Array) -> Any:
    """Arrays [B, S, ...], index int [B] -> [B, ...]."""
    return jax.tree.map(lambda x: read_slots(x, index), states)
