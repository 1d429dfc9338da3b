"""The rollout (training-time test): the head drafts K tokens from every row at once.

Row i, step k = 0..K-1:
    reads       the embedding of token x[i+1+k], and the state:
                fc(features[i]) at k = 0, the head's own output of step k-1 after that
    stands at   rotary position i + k
    attends to  the step-0 keys j <= i of its document, and its own keys of the steps 1..k
    predicts    x[i+2+k], as the target does at position i+1+k

Rows talk to each other through the step-0 keys and values only; that is what serving does: when it
drafts from row i, everything before i has been verified and carries real features.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from MaxDraft.drafts import eagle3
from MaxDraft.drafts.eagle3 import HeadDims
from MaxDraft.layers.attention import packed_attention
from MaxDraft.layers.params import Tree


def shift_left(x: jax.Array, by: int) -> jax.Array:
    """out[:, i] = x[:, i + by], zeros past the end; x [B, T, ...]."""
    pad = [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad)[:, by:]


def rollout(
    params: Tree,
    dims: HeadDims,
    embeddings: jax.Array,  # [B, T, H] of the tokens x
    features: jax.Array,  # [B, T, 3H] captured in the target
    positions: jax.Array,  # int [B, T] inside each document
    segment_ids: jax.Array,  # int [B, T]
    ttt_length: int,  # K
    block: int,  # queries attended at a time
) -> list[jax.Array]:
    """-> K states [B, T, H], the head's un-normed outputs of steps 0..K-1.

    The backward pass keeps each step's input state and own keys, and recomputes the rest.
    """

    @functools.partial(jax.checkpoint, static_argnums=0)
    def step(k, params, state, shared, own):
        q, key, value = eagle3.project(
            params, dims, shift_left(embeddings, 1 + k), state, positions + k
        )
        if k == 0:
            shared = (key, value)
        else:
            own = (*own, (key, value))
        attended = packed_attention(q, *shared, segment_ids, block, *_stacked(own))
        return eagle3.finish(params, dims, state, attended), shared, own

    state, shared, own = eagle3.fuse(params, features), None, ()
    states = []
    for k in range(ttt_length):
        state, shared, own = step(k, params, state, shared, own)
        states.append(state)
    return states


def _stacked(own: tuple) -> tuple[jax.Array | None, jax.Array | None]:
    """J pairs of [B, T, M, d] -> keys and values [B, T, J, M, d]."""
    if not own:
        return None, None
    keys, values = zip(*own, strict=True)
    return jnp.stack(keys, axis=2), jnp.stack(values, axis=2)
