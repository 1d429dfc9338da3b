"""The rollout (training-time test): the head drafts K tokens from every row at once.

Row i, step k = 0..K-1:
    reads       the embedding of token x[i+1+k], and the state:
                fc(features[i]) at k = 0, the head's own output of step k-1 after that
    stands at   rotary position i + k
    attends to  the step-0 keys j <= i of its document, and its own keys of the steps 1..k
    predicts    x[i+2+k], as the target does at position i+1+k

Rows talk to each other through the step-0 keys and values only; that is what serving does: when it
drafts from row i, everything before i has been verified and carries real features. So every row
pays for its step-0 key and value (`first_step`), and any set of rows can be rolled out by itself.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.drafts.eagle3.head import HeadDims
from MaxDraft.layers.attention import document_starts, interval_attention, merge_own_keys
from MaxDraft.layers.attention_keys import Keys
from MaxDraft.layers.params import Tree


def shift_left(x: jax.Array, by: int) -> jax.Array:
    """out[:, i] = x[:, i + by], zeros past the end; x [B, T, ...]."""
    pad = [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad)[:, by:]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the rollout reads of the packed rows of a batch, laid end to end: L tokens."""

    embeddings: jax.Array  # [L, H]
    features: jax.Array  # [L, 3H] captured in the target
    positions: jax.Array  # int [L] inside each document
    starts: jax.Array  # int [L] where each token's document begins
    length: int = dataclasses.field(metadata={"static": True})  # T, of a packed row

    @classmethod
    def of(cls, embeddings, features, positions, segment_ids) -> Tokens:
        """[B, T, ...] each; no document goes on from one packed row to the next."""
        offsets = jnp.arange(len(segment_ids), dtype=jnp.int32)[:, None] * segment_ids.shape[1]
        starts = document_starts(segment_ids) + offsets
        return cls(
            *(x.reshape(-1, *x.shape[2:]) for x in (embeddings, features, positions, starts)),
            length=segment_ids.shape[1],
        )


def first_step(
    params: Tree, dims: HeadDims, tokens: Tokens
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> fc(features) [L, H], and the step-0 keys and values [1, L, M, d] that rows see."""
    state = eagle3.fuse(params, tokens.features[None])
    x = eagle3.layer_input(params, dims, shift_left(tokens.embeddings[None], 1), state)
    return state[0], *eagle3.keys_values(params, dims, x, tokens.positions[None])


def rollout(
    params: Tree,
    dims: HeadDims,
    state: jax.Array,  # [R, H] of first_step, at the rows
    keys: Keys,  # of first_step
    gradients: Keys | None,  # of the keys, see interval_attention
    tokens: Tokens,
    rows: jax.Array,  # int [R] places in 0..L-1; -1: none
    ttt_length: int,  # K
) -> tuple[jax.Array, Keys | None]:
    """-> the head's un-normed outputs [K, R, H], gradients."""
    first = jnp.where(rows < 0, 0, tokens.starts[rows])[None]
    positions = tokens.positions[rows][None]

    def step(k, params, state, own, gradients):
        token = jnp.minimum(rows + 1 + k, len(tokens.embeddings) - 1)
        x = eagle3.layer_input(params, dims, tokens.embeddings[token][None], state)
        q = eagle3.queries(params, dims, x, positions + k)
        attended, log_sum, gradients = interval_attention(q, keys, gradients, first, rows[None])
        if k > 0:
            own = (*own, eagle3.keys_values(params, dims, x, positions + k))
            own_k, own_v = (jnp.stack(part) for part in zip(*own, strict=True))
            attended = merge_own_keys(attended, log_sum, q, own_k, own_v)
        return eagle3.finish(params, dims, state, attended), own, gradients

    state, own, states = state[None], (), []
    for k in range(ttt_length):
        state, own, gradients = step(k, params, state, own, gradients)
        states.append(state[0])
    return jnp.stack(states), gradients


def rollout_everywhere(
    params: Tree,
    dims: HeadDims,
    embeddings: jax.Array,  # [B, T, H] of the tokens x
    features: jax.Array,  # [B, T, 3H]
    positions: jax.Array,  # int [B, T]
    segment_ids: jax.Array,  # int [B, T]
    ttt_length: int,
    block: int,
) -> jax.Array:
    """-> [K, B, T, H]: the rollout of every row, whether it would be trained or not."""
    tokens = Tokens.of(embeddings, features, positions, segment_ids)
    state, k, v = first_step(params, dims, tokens)
    rows = jnp.arange(len(state), dtype=jnp.int32)
    keys = Keys.from_arrays(k, v, block, tokens.length)
    states, _ = rollout(params, dims, state, keys, None, tokens, rows, ttt_length)
    return states.reshape(ttt_length, *embeddings.shape)
