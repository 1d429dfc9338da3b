"""Which positions train: those that serving really drafts from.

Serving's first draft for a reply x[s..e-1] stands at position s-1: the target's hidden states of
the last prompt token and the embedding of the first generated token x[s]; it drafts x[s+1]. So
position i is supervised at step k when x[i+1], ..., x[i+2+k] are all assistant tokens of one turn,
in the document of position i.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def shift_left(x: jax.Array, by: int) -> jax.Array:
    """out[:, i] = x[:, i + by], zeros past the end; x [B, T, ...]."""
    pad = [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad)[:, by:]


def loss_mask(
    turn_ids: jax.Array,  # int [B, T]: 0 where the assistant did not write, else the turn
    segment_ids: jax.Array,  # int [B, T]: 0 at pads, else the document
    num_steps: int,  # K
    alignment: str,  # "serving", or "specforge": the published PyTorch trainers' positions
) -> jax.Array:  # bool [K, B, T]
    """Positions that each step supervises, before the draft vocabulary is considered."""
    of_step = serving_loss_mask if alignment == "serving" else specforge_loss_mask
    return jnp.stack([of_step(turn_ids, segment_ids, k) for k in range(num_steps)])


def serving_loss_mask(turn_ids: jax.Array, segment_ids: jax.Array, k: int) -> jax.Array:
    """bool [B, T]: x[i+1] .. x[i+2+k] are one assistant turn of position i's document."""
    turn = shift_left(turn_ids, 1)
    mask = turn > 0
    for offset in range(1, k + 3):
        mask &= shift_left(turn_ids, offset) == turn
        mask &= shift_left(segment_ids, offset) == segment_ids
    return mask


def specforge_loss_mask(turn_ids: jax.Array, segment_ids: jax.Array, k: int) -> jax.Array:
    """bool [B, T]: the mask is not shifted with the tokens but slides left with k: x[i+k] counts.

    A position whose teacher would stand in another document is never supervised.
    """
    same_document = (segment_ids > 0) & (shift_left(segment_ids, 1 + k) == segment_ids)
    return same_document & (shift_left(turn_ids, k) > 0)


def teacher_mask(loss_mask: jax.Array) -> jax.Array:
    """Where the teacher is needed: bool [B, T] from loss_mask bool [K, B, T].

    Step k at position i needs the teacher at i+1+k. Position i+k is then supervised at step 0 and
    needs the same teacher, so step 0's mask, shifted by one, covers all steps.
    """
    return jnp.pad(loss_mask[0], ((0, 0), (1, 0)))[:, :-1]


def teacher_in_vocab(
    teacher_argmax: jax.Array,  # int [B, T]
    in_draft_vocab: jax.Array,  # bool [V]
    num_steps: int,  # K
) -> jax.Array:  # bool [K, B, T]
    """Positions whose teacher's argmax, over all V tokens, the head could draft at all."""
    inside = in_draft_vocab[teacher_argmax]
    return jnp.stack([shift_left(inside, 1 + k) for k in range(num_steps)])
