"""The rollout's loss: soft cross-entropy against the target, over the draft vocabulary.

    p = softmax of the target's logits restricted to the D draft tokens (renormalised)
    q = softmax of the head's logits
    loss_k(row) = - sum_v p_v log q_v
    total = sum_k decay^k * (sum of loss_k over its counted rows) / (their number)

Row i of step k is judged by the teacher at position i+1+k. The work is therefore laid out by
teacher position: a block of positions computes its teacher once and judges the K states that look
at it.
Nothing of size [T, V] or [T, D] is kept: the backward pass recomputes each block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from MaxDraft.drafts import eagle3
from MaxDraft.drafts.eagle3 import HeadDims
from MaxDraft.drafts.rollout import shift_left
from MaxDraft.layers.blocks import merge_length, split_length
from MaxDraft.layers.norms import soft_cap
from MaxDraft.layers.params import Tree
from MaxDraft.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """What the target says at every position of a batch."""

    last: jax.Array  # [B, T, H] final normed state
    best: jax.Array  # int32 [B, T] argmax over all V tokens
    log_norm: jax.Array  # float32 [B, T] log sum exp of all V logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowResults:
    """Per step and row; float32 or bool [K, B, T]. Rows without a teacher hold garbage."""

    loss: jax.Array  # -sum p log q
    correct: jax.Array  # bool: the head's argmax is the target's full-vocabulary argmax
    alpha: jax.Array  # sum_v min(p_full(v), q(v)), p over all V tokens


def judge(
    params: Tree,
    dims: HeadDims,
    states: list[jax.Array],  # K of [B, T, H], from the rollout
    teacher: Teacher,
    teacher_head: jax.Array,  # [H, D]: the target's LM head, draft tokens only
    draft_to_target: jax.Array,  # int32 [D]
    block: int,  # positions judged at a time
    softcap: float = 0.0,  # of the target's logits; 0: none
) -> RowResults:
    """Loss and agreement of every row at every step."""
    steps, length = len(states), teacher.last.shape[1]
    # At teacher position t, step k judges row t-1-k: shifting by that lays all K states in step.
    by_position = [_shift_right(state, 1 + k) for k, state in enumerate(states)]

    @jax.checkpoint
    def of_block(args):
        last, best, log_norm, *states = args
        teacher_logits = jnp.matmul(
            last, teacher_head.astype(last.dtype), preferred_element_type=jnp.float32
        )
        teacher_logits = soft_cap(constrain(teacher_logits, "draft_batch", None, None), softcap)
        log_p = jax.nn.log_softmax(teacher_logits)
        # Softmax over all V tokens is p times the share of probability inside the draft vocabulary.
        inside = jnp.exp(jax.nn.logsumexp(teacher_logits, -1) - log_norm)
        p = jnp.exp(log_p)

        def against(state):
            log_q = jax.nn.log_softmax(eagle3.logits(params, dims, state))
            drafted = draft_to_target[jnp.argmax(log_q, -1)]
            alpha = jnp.minimum(p * inside[..., None], jnp.exp(log_q)).sum(-1)
            return -(p * log_q).sum(-1), drafted == best, jax.lax.stop_gradient(alpha)

        return tuple(against(state) for state in states)

    blocks = jax.lax.map(
        of_block,
        tuple(
            split_length(x, block)
            for x in (teacher.last, teacher.best, teacher.log_norm, *by_position)
        ),
    )

    def by_row(field: int) -> jax.Array:  # K blocked [B, T] by position -> [K, B, T] by row
        return jnp.stack(
            [shift_left(merge_length(blocks[k][field], length), 1 + k) for k in range(steps)]
        )

    return RowResults(loss=by_row(0), correct=by_row(1), alpha=by_row(2))


def teacher_in_vocabulary(
    teacher_best: jax.Array,  # int [B, T]
    target_to_draft: jax.Array,  # bool [V]: true inside the draft vocabulary (t2d)
    ttt_length: int,
) -> jax.Array:  # bool [K, B, T]
    """Rows whose teacher's argmax the head could draft at all."""
    inside = target_to_draft[teacher_best]
    return jnp.stack([shift_left(inside, 1 + k) for k in range(ttt_length)])


def total_loss(
    loss: jax.Array,  # float32 [K, B, T]
    counted: jax.Array,  # bool [K, B, T]
    denominators: jax.Array,  # float32 [K], over the whole optimizer step
    decay: float,
) -> jax.Array:
    """sum_k decay^k * sum(loss_k over its counted rows) / denominator_k; a part of it per batch."""
    sums = jnp.where(counted, loss, 0.0).sum(axis=(1, 2))
    weights = decay ** jnp.arange(loss.shape[0], dtype=jnp.float32)
    return (weights * sums / jnp.maximum(denominators, 1.0)).sum()


def _shift_right(x: jax.Array, by: int) -> jax.Array:
    """out[:, t] = x[:, t - by], zeros before the start; x [B, T, H]."""
    return jnp.pad(x, [(0, 0), (by, 0), (0, 0)])[:, : x.shape[1]]
