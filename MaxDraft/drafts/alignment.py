"""Which rows of the rollout train: those that serving really drafts from.

Serving's first draft for a reply x[s..e-1] stands at row s-1: the feature of the last prompt token
and the embedding of the first generated token x[s]; it drafts x[s+1]. So row i counts at step k
when x[i+1], ..., x[i+2+k] are all assistant tokens of one turn, in row i's document.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from MaxDraft.drafts.eagle3.rollout import shift_left


def aligned_rows(
    turn_ids: jax.Array,  # int [B, T]: 0 where the assistant did not write, else the turn
    segment_ids: jax.Array,  # int [B, T]: 0 at pads, else the document
    ttt_length: int,
    alignment: str,  # "serving", or "specforge": the published PyTorch trainers' rows
) -> jax.Array:  # bool [K, B, T]
    """Rows whose loss may count at each step, before the draft vocabulary is considered."""
    rows = serving_rows if alignment == "serving" else specforge_rows
    return jnp.stack([rows(turn_ids, segment_ids, k) for k in range(ttt_length)])


def serving_rows(turn_ids: jax.Array, segment_ids: jax.Array, k: int) -> jax.Array:
    """bool [B, T]: x[i+1] .. x[i+2+k] are one assistant turn of row i's document."""
    first = shift_left(turn_ids, 1)
    aligned = first > 0
    for ahead in range(1, k + 3):
        aligned &= shift_left(turn_ids, ahead) == first
        aligned &= shift_left(segment_ids, ahead) == segment_ids
    return aligned


def specforge_rows(turn_ids: jax.Array, segment_ids: jax.Array, k: int) -> jax.Array:
    """bool [B, T]: the mask is not shifted with the tokens but slides left with k: x[i+k] counts.

    A row whose teacher would stand in another document never counts.
    """
    same_document = (segment_ids > 0) & (shift_left(segment_ids, 1 + k) == segment_ids)
    return same_document & (shift_left(turn_ids, k) > 0)


def teacher_positions(aligned: jax.Array) -> jax.Array:
    """Where some row is judged: bool [B, T] from aligned bool [K, B, T].

    Row i of step k is judged at i+1+k, where row i+k of step 0 is, and that row is aligned as well.
    """
    return jnp.pad(aligned[0], ((0, 0), (1, 0)))[:, :-1]
