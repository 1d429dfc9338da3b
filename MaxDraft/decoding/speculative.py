"""Speculative decoding with a draft head: chains of N drafts, verified by one target pass.

With x[0..n-1] committed, the target has read x[0..n-2] and the head has read rows 0..n-2 (row i:
feature of x[i], embedding of x[i+1]). One round:

    draft    d_1 from row n-2; then d_j at rotary position n-2+j-1 from the head's own state
    verify   the target reads x[n-1], d_1..d_N: N+1 distributions, a drafts are accepted
    commit   the accepted drafts and one token of the target's own
    extend   the head reads rows n-1..n+a-1 with the verified features, over its drafted keys

Greedy acceptance keeps d_j while it is the target's argmax. Sampling keeps d_j with probability
min(1, p/q), and at the first refusal draws from max(p - q, 0): the output's distribution is the
target's own (Leviathan et al. 2023, Chen et al. 2023).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft.decoding.generate import (
    Reply,
    TargetModel,
    at,
    choose,
    is_stop,
    probabilities,
    write,
)
from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.drafts.eagle3.head import HeadDims
from MaxDraft.layers.attention import cached_attention
from MaxDraft.layers.params import Tree
from MaxDraft.targets import decoder


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """The head as serving runs it: with a KV cache, a few rows at a time."""

    dims: HeadDims
    dtype: Any

    def empty_cache(self, batch: int, slots: int) -> tuple[jax.Array, jax.Array]:
        """Zeros: keys and values [B, C, M, d]."""
        shape = (batch, slots, self.dims.num_kv_heads, self.dims.head_dim)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def step(
        self,
        params: Tree,
        cache: tuple[jax.Array, jax.Array],
        embeddings: jax.Array,  # [B, S, H] of the tokens that the rows read
        state: jax.Array,  # [B, S, H] fused features, or the head's own last output
        slots: jax.Array,  # int [B, S] cache slot and rotary position
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """-> un-normed output [B, S, H], cache."""
        x = eagle3.layer_input(params, self.dims, embeddings, state)
        q = eagle3.queries(params, self.dims, x, slots)
        k, v = eagle3.keys_values(params, self.dims, x, slots)
        cache = write(cache, (k, v), slots)
        attended = cached_attention(q, *cache, slots)
        return eagle3.finish(params, self.dims, state, attended), cache


def accept_greedy(
    drafts: jax.Array,  # int32 [B, N]
    target_logits: jax.Array,  # float32 [B, N+1, V]
) -> tuple[jax.Array, jax.Array]:
    """-> accepted drafts a int32 [B], committed tokens [B, N+1] of which the first a+1 count."""
    best = jnp.argmax(target_logits, -1).astype(jnp.int32)
    agreed = jnp.cumprod(drafts == best[:, :-1], axis=1)
    return agreed.sum(1).astype(jnp.int32), best


def accept_sampled(
    key: jax.Array,
    drafts: jax.Array,  # int32 [B, N], target ids, drawn from q
    q: jax.Array,  # float32 [B, N, V] what they were drawn from
    p: jax.Array,  # float32 [B, N+1, V] the target's distributions
) -> tuple[jax.Array, jax.Array]:
    """Lossless rejection sampling; same result as accept_greedy."""
    batch, chain = drafts.shape
    uniform_key, residual_key = jax.random.split(key)
    p_draft = jnp.take_along_axis(p[:, :-1], drafts[..., None], -1)[..., 0]
    q_draft = jnp.take_along_axis(q, drafts[..., None], -1)[..., 0]
    kept = jax.random.uniform(uniform_key, (batch, chain)) * q_draft < p_draft
    accepted = jnp.cumprod(kept, axis=1).sum(1).astype(jnp.int32)
    # Past the last draft nothing was proposed: q = 0 there, and the residual is p itself.
    q = jnp.concatenate([q, jnp.zeros_like(q[:, :1])], axis=1)
    residual = jnp.maximum(at(p, accepted) - at(q, accepted), 0.0)
    own = jax.random.categorical(residual_key, jnp.log(residual)).astype(jnp.int32)
    tokens = jnp.concatenate([drafts, jnp.zeros_like(drafts[:, :1])], axis=1)
    return accepted, tokens.at[jnp.arange(batch), accepted].set(own)


def decode_speculative(
    target: TargetModel,
    head: DraftModel,
    target_params: Tree,
    head_params: Tree,
    draft_to_target: jax.Array,  # int32 [D]
    prompt: jax.Array,  # int32 [B, P]
    prompt_length: jax.Array,  # int32 [B]
    key: jax.Array,
    *,
    draft_steps: int,  # N
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float,
) -> Reply:
    """Same output as decode_plain at temperature 0, same distribution above it."""
    batch, width = prompt.shape
    chain = jnp.arange(draft_steps + 1)
    slots_needed = width + max_new_tokens + draft_steps + 1

    def embed(tokens):
        return decoder.embed(target_params, tokens, target.dtype)

    def propose(key, state):  # un-normed state [B, H] -> tokens [B], distribution [B, V]
        logits = eagle3.logits(head_params, head.dims, state)
        tokens = draft_to_target[choose(key, logits, temperature)]
        if temperature == 0:
            return tokens, None
        full = jnp.zeros((batch, target.dims.vocab_size), jnp.float32)
        return tokens, full.at[:, draft_to_target].set(probabilities(logits, temperature))

    # The prompt: the target reads it, then the head reads its rows with the tokens one to the left.
    slots = jnp.broadcast_to(jnp.arange(width), prompt.shape)
    target_cache = target.empty_cache(batch, slots_needed)
    features, last, target_cache = target.extend(target_params, target_cache, prompt, slots)
    first = choose(
        jax.random.fold_in(key, 0),
        decoder.logits(target_params, target.dims, at(last, prompt_length - 1)),
        temperature,
    )
    next_tokens = jnp.roll(prompt, -1, axis=1).at[jnp.arange(batch), prompt_length - 1].set(first)
    states, head_cache = head.step(
        head_params,
        head.empty_cache(batch, slots_needed),
        embed(next_tokens),
        eagle3.fuse(head_params, features),
        slots,
    )
    state = at(states, prompt_length - 1)
    out = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first)

    def draft(key, token, state, head_cache, position):
        """The chain d_1..d_N from the state of the last committed row, at `position`."""
        drafts, distributions = [], []
        for j in range(draft_steps):
            if j > 0:
                states, head_cache = head.step(
                    head_params,
                    head_cache,
                    embed(token[:, None]),
                    state[:, None],
                    (position + j)[:, None],
                )
                state = states[:, 0]
            token, distribution = propose(jax.random.fold_in(key, j), state)
            drafts.append(token)
            distributions.append(distribution)
        return jnp.stack(drafts, axis=1), distributions, head_cache

    def body(carry):
        target_cache, head_cache, state, out, length, active, verify_steps, accepted_at = carry
        draft_key, accept_key = jax.random.split(jax.random.fold_in(key, 1 + verify_steps.max()), 2)
        committed = prompt_length + length  # n
        token = at(out, length - 1)  # x[n-1]

        drafts, distributions, head_cache = draft(
            draft_key, token, state, head_cache, committed - 2
        )
        slots = (committed - 1)[:, None] + chain
        features, last, target_cache = target.extend(
            target_params, target_cache, jnp.concatenate([token[:, None], drafts], axis=1), slots
        )
        logits = decoder.logits(target_params, target.dims, last)
        if temperature == 0:
            accepted, tokens = accept_greedy(drafts, logits)
        else:
            accepted, tokens = accept_sampled(
                accept_key,
                drafts,
                jnp.stack(distributions, axis=1),
                probabilities(logits, temperature),
            )

        states, head_cache = head.step(
            head_params, head_cache, embed(tokens), eagle3.fuse(head_params, features), slots
        )
        state = at(states, accepted)

        # A reply ends with its first stop token, or at max_new_tokens.
        stops = is_stop(tokens, stop_ids) & (chain <= accepted[:, None])
        before_stop = jnp.cumsum(stops, axis=1) - stops == 0
        room = chain < (max_new_tokens - length)[:, None]
        emitted = active[:, None] & (chain <= accepted[:, None]) & before_stop & room
        where = jnp.where(emitted, length[:, None] + chain, max_new_tokens)  # else dropped
        out = out.at[jnp.arange(batch)[:, None], where].set(tokens, mode="drop")
        length = length + emitted.sum(1)
        verify_steps = verify_steps + active
        accepted_at = accepted_at + (active[:, None] & (chain[:-1] < accepted[:, None]))
        active &= ~(emitted & stops).any(1) & (length < max_new_tokens)
        return target_cache, head_cache, state, out, length, active, verify_steps, accepted_at

    length = jnp.ones(batch, jnp.int32)
    active = ~is_stop(first, stop_ids) & (length < max_new_tokens)
    carry = (
        target_cache,
        head_cache,
        state,
        out,
        length,
        active,
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, draft_steps), jnp.int32),
    )
    carry = jax.lax.while_loop(lambda carry: carry[5].any(), body, carry)
    _, _, _, out, length, _, verify_steps, accepted_at = carry
    return Reply(out, length, verify_steps, accepted_at)
