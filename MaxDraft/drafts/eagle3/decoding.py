"""How serving runs the EAGLE-3 head: with a KV cache, a few positions at a time.

At position i the head reads the target's aux hidden states of x[i] and the embedding of x[i+1], and
drafts x[i+2]. While a chain is drafted there are no aux hidden states yet: the head then reads its
own output at the position before. Decoding calls these functions through the DecodeDrafter of
decoding/drafter.py.

B batch, S positions, `slots` of the cache, C captured layers, H hidden size, D draft vocabulary,
V vocabulary, gamma drafts of a chain (Leviathan et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.layers.attention import cached_attention, write_slots
from MaxDraft.layers.params import Tree
from MaxDraft.sharding import constrain

Cache = tuple[jax.Array, jax.Array]  # keys and values [B, slots, M, d]


def empty_cache(dims: HeadDims, batch: int, num_slots: int, dtype: Any) -> Cache:
    """Zeros: keys and values [B, slots, M, d]."""
    zeros = jnp.zeros((batch, num_slots, dims.num_kv_heads, dims.head_dim), dtype)
    zeros = constrain(zeros, "draft_batch", None, None, None)
    return zeros, zeros


def absorb(
    params: Tree,
    dims: HeadDims,
    cache: Cache,
    next_embeddings: jax.Array,  # [B, S, H] of x[i+1] at position i
    aux_hidden_states: jax.Array,  # [B, S, C * H] of the target at x[i]
    slots: jax.Array,  # int [B, S] where the keys and values are written
    positions: jax.Array,  # int [B, S] of the rotary embedding
    visible: jax.Array,  # bool [B, S, slots] the slots that each position sees, its own included
) -> tuple[jax.Array, Cache]:
    """Reads tokens that the target has verified -> outputs [B, S, H], cache.

    The output at the last of the committed positions is what drafting starts from.
    """
    state = eagle3.fuse_aux_hidden_states(params, dims, aux_hidden_states)
    return _decoder_layer(params, dims, cache, next_embeddings, state, slots, positions, visible)


def draft(
    params: Tree,
    dims: HeadDims,
    cache: Cache,
    *,
    embed: Callable[[jax.Array], jax.Array],  # token ids int [B, S] -> [B, S, H]
    state: jax.Array,  # [B, H], absorb's output at the last committed position
    token: jax.Array,  # int [B] the last committed token, whose embedding `state` has read
    slots: jax.Array,  # int [B] the first free slot; the gamma - 1 slots from there on are written
    positions: jax.Array,  # int [B] the position of `token`
    visible: jax.Array,  # bool [B, slots] the slots of the committed positions
    choose: Callable[[int, jax.Array], tuple[jax.Array, jax.Array | None]],
    num_draft_tokens: int,  # gamma
    recurrent_position_offset: int = 0,
) -> tuple[jax.Array, jax.Array | None, Cache]:
    """A chain -> drafts int32 [B, gamma], what they were drawn from float32 [B, gamma, V], cache.

    choose: (number of the draft, logits [B, D]) -> target's token ids [B], and the distribution
        [B, V] that they were drawn from; None where the largest logit was taken.
    recurrent_position_offset: added to the rotary position wherever the head reads its own output.
        0: positions follow on one another, as in training.
    """
    every_slot = jnp.arange(visible.shape[-1])
    tokens, distributions = [], []
    for step in range(num_draft_tokens):
        if step > 0:
            slot = slots + step - 1
            position = positions + step - 1 + recurrent_position_offset
            visible = visible | (every_slot == slot[:, None])
            states, cache = _decoder_layer(
                params,
                dims,
                cache,
                embed(token[:, None]),
                state[:, None],
                slot[:, None],
                position[:, None],
                visible[:, None],
            )
            state = states[:, 0]
        token, distribution = choose(step, eagle3.logits(params, dims, state))
        tokens.append(token)
        distributions.append(distribution)
    sampled = distributions[0] is not None
    return jnp.stack(tokens, 1), jnp.stack(distributions, 1) if sampled else None, cache


def _decoder_layer(
    params: Tree,
    dims: HeadDims,
    cache: Cache,
    embeddings: jax.Array,  # [B, S, H] of the next tokens
    state: jax.Array,  # [B, S, H] fused aux hidden states, or the head's own output
    slots: jax.Array,
    positions: jax.Array,
    visible: jax.Array,
) -> tuple[jax.Array, Cache]:
    """The head's one layer -> outputs [B, S, H], cache."""
    x = eagle3.layer_input(params, dims, embeddings, state)
    q = eagle3.queries(params, dims, x, positions)
    cache = write_slots(cache, eagle3.keys_values(params, dims, x, positions), slots)
    cache = tuple(constrain(part, "draft_batch", None, None, None) for part in cache)
    attended = cached_attention(q, *cache, visible)
    return eagle3.decoder_layer_output(params, dims, state, attended), cache
