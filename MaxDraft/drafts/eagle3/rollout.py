"""The rollout (training-time test): the head drafts K tokens from every position at once.

Position i, step k = 0..K-1:
    reads       the embedding of token x[i+1+k], and the state:
                fc(aux_hidden_states[i]) at k = 0, the head's own output of step k-1 after that
    stands at   rotary position i + k
    attends to  the step-0 keys j <= i of its document, and its own keys of the steps 1..k
    predicts    x[i+2+k], as the target does at position i+1+k

Positions talk to each other through the step-0 keys and values only; that is what serving does:
when it drafts from position i, everything before i has been verified and carries the target's own
hidden states. So every token pays for its step-0 key and value (`step_0_keys_values`), and any set
of positions can be rolled out by itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from MaxDraft.drafts.alignment import shift_left
from MaxDraft.drafts.drafter import DraftInputs
from MaxDraft.drafts.eagle3 import head
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.layers.attention import interval_attention, merge_own_keys
from MaxDraft.layers.attention_keys import KeyValueBlocks
from MaxDraft.layers.params import Tree


def step_0_keys_values(
    params: Tree, dims: HeadDims, inputs: DraftInputs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> fc(aux_hidden_states) [L, H], and the step-0 keys and values [1, L, M, d]."""
    state = head.fuse_aux_hidden_states(params, dims, inputs.aux_hidden_states[None])
    x = head.layer_input(params, dims, shift_left(inputs.embeddings[None], 1), state)
    return state[0], *head.keys_values(params, dims, x, inputs.positions[None])


def rollout(
    params: Tree,
    dims: HeadDims,
    state: jax.Array,  # [R, H] of step_0_keys_values, at the positions
    keys: KeyValueBlocks,  # of step_0_keys_values
    d_keys: KeyValueBlocks | None,  # gradient of the keys so far, see interval_attention
    inputs: DraftInputs,
    positions: jax.Array,  # int [R] places in 0..L-1; -1: none
    num_steps: int,  # K
) -> tuple[jax.Array, KeyValueBlocks | None]:
    """-> the head's output states [K, R, H], d_keys."""
    starts = jnp.where(positions < 0, 0, inputs.document_starts[positions])[None]
    rotary_positions = inputs.positions[positions][None]

    state, own_keys_values, states = state[None], (), []
    for k in range(num_steps):
        token = jnp.minimum(positions + 1 + k, len(inputs.embeddings) - 1)
        x = head.layer_input(params, dims, inputs.embeddings[token][None], state)
        q = head.queries(params, dims, x, rotary_positions + k)
        attended, log_sum, d_keys = interval_attention(q, keys, d_keys, starts, positions[None])
        if k > 0:
            new = head.keys_values(params, dims, x, rotary_positions + k)
            own_keys_values = (*own_keys_values, new)
            own_k, own_v = (jnp.stack(part) for part in zip(*own_keys_values, strict=True))
            attended = merge_own_keys(attended, log_sum, q, own_k, own_v)
        state = head.decoder_layer_output(params, dims, state, attended)
        states.append(state[0])
    return jnp.stack(states), d_keys


def rollout_everywhere(
    params: Tree, dims: HeadDims, inputs: DraftInputs, num_steps: int, block: int
) -> jax.Array:
    """-> [K, L, H]: the rollout of every position, whether it would be trained or not."""
    state, k, v = step_0_keys_values(params, dims, inputs)
    positions = jnp.arange(len(state), dtype=jnp.int32)
    keys = KeyValueBlocks.from_arrays(k, v, block, inputs.row_length)
    states, _ = rollout(params, dims, state, keys, None, inputs, positions, num_steps)
    return states
