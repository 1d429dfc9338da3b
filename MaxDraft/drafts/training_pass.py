"""Loss, gradient and metrics of the tokens of one device: a block of rows at a time.

    every token     fc, step-0 key and value                                    (first_step)
    block of rows   the rows that are judged at some step, as they come, R at a time:
                    rollout of K steps -> loss -> gradient of everything the block read
    every token     the gradients of step-0 states, keys and values go back to fc, k and v

Rows that nobody judges are never rolled out: the judged ones are put first, and the loop ends with
the last of them. The work is that of the judged rows, rounded up to a block, whatever share of the
batch they are; nothing can overflow. Activations exist for one block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.drafts.eagle3.head import HeadDims
from MaxDraft.drafts.eagle3.rollout import Tokens, first_step, rollout
from MaxDraft.drafts.losses import Judge, RowResults, Teacher, judged
from MaxDraft.layers.attention_keys import Keys
from MaxDraft.layers.loops import counted_loop
from MaxDraft.layers.norms import soft_cap
from MaxDraft.layers.params import Tree


@dataclasses.dataclass(frozen=True)
class PassDims:
    """How the pass computes."""

    ttt_length: int  # K
    loss: str  # one of losses.LOSSES
    row_block: int  # R, rows rolled out at a time
    attention_block: int  # rows and keys attended at a time
    attention_kernel: str = "xla"  # one of attention.IMPLEMENTATIONS
    softcap: float = 0.0  # of the target's logits; 0: none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judgement:
    """What rows are judged by, L tokens laid end to end."""

    teacher: Teacher  # [L, ...]
    teacher_head: jax.Array  # [H, D]: the target's LM head, draft tokens only
    target_to_draft: jax.Array  # int32 [V], -1: outside the draft vocabulary
    blocks: Blocks  # of the rows that are judged
    weights: jax.Array  # float32 [K, L] what the loss of each counts in the total, 0: nothing


def judge_rows(
    params: Tree, dims: HeadDims, tokens: Tokens, judgement: Judgement, how: PassDims
) -> RowResults:
    """-> results [K, L] of the judged rows; zeros elsewhere."""
    state, k, v = first_step(params, dims, tokens)
    keys = Keys.from_arrays(k, v, how.attention_block, tokens.length, how.attention_kernel)
    blocks = judgement.blocks

    def of_block(i, results):
        rows = blocks.rows(i)
        given = (keys, tokens, judgement, i, dims, how)
        _, (found, _), _ = _block(params, _at(state, rows), None, None, *given)
        return _put(results, rows, found)

    return blocks.over(of_block, _nothing(judgement.weights))


def loss_and_gradient(
    params: Tree, dims: HeadDims, tokens: Tokens, judgement: Judgement, how: PassDims
) -> tuple[jax.Array, Tree, RowResults]:
    """-> sum of weights * loss, its gradient, float32 like params, and what judge_rows gives."""
    (state, k, v), pull_back = jax.vjp(lambda params: first_step(params, dims, tokens), params)
    keys = Keys.from_arrays(k, v, how.attention_block, tokens.length, how.attention_kernel)
    blocks = judgement.blocks

    def of_block(i, carry):
        loss, gradient, d_head, d_state, d_keys, results = carry
        rows = blocks.rows(i)

        def block(params, state, d_keys):
            given = (keys, tokens, judgement, i, dims, how)
            loss, aux, d_keys = _block(params, state, d_keys, d_head, *given)
            return (loss, d_keys), aux

        (added, _), block_pull_back, (found, d_head) = jax.vjp(
            block, params, _at(state, rows), d_keys, has_aux=True
        )
        # The keys' gradient is handed through the block, which adds its own.
        d_params, d_rows, d_keys = block_pull_back((jnp.ones_like(added), d_keys))
        return (
            loss + added,
            _add_layer(gradient, d_params),
            d_head,
            d_state.at[_place(rows, state)].set(d_rows, mode="drop"),
            d_keys,
            _put(results, rows, found),
        )

    # Blocks' gradients are added up in float32.
    zeros = jax.tree.map(jnp.zeros_like, params)
    d_head, layer = zeros["lm_head"], {**zeros, "lm_head": None}
    results = _nothing(judgement.weights)
    carry = (jnp.float32(0), layer, d_head, jnp.zeros_like(state), keys.zeros(), results)
    loss, layer, d_head, d_state, d_keys, results = blocks.over(of_block, carry)
    d_k, d_v = (x.astype(k.dtype) for x in d_keys.arrays(len(state)))
    [d_params] = pull_back((d_state, d_k, d_v))
    return loss, {**_add_layer(layer, d_params), "lm_head": d_head}, results


def _add_layer(total: Tree, gradient: Tree) -> Tree:
    """Of all parameters but the LM head, whose gradient the loss makes itself."""
    return jax.tree.map(jnp.add, total, {**gradient, "lm_head": None})


def _block(
    params: Tree,
    state: jax.Array,  # [R, H]
    d_keys: Keys | None,  # so far, see interval_attention
    d_head: jax.Array | None,  # so far, see losses.judged
    keys: Keys,
    tokens: Tokens,
    judgement: Judgement,
    i: jax.Array,
    dims: HeadDims,
    how: PassDims,
) -> tuple[jax.Array, tuple[RowResults, jax.Array | None], Keys | None]:
    """Loss of block i, the results of its rows [K, R], d_head, d_keys."""
    blocks = judgement.blocks
    rows = blocks.rows(i)
    states, d_keys = rollout(params, dims, state, keys, d_keys, tokens, rows, how.ttt_length)
    # Row i is judged at step 0 by the teacher at position i + 1.
    positions = blocks.rows(i, behind=how.ttt_length - 1) + 1
    teacher = jax.tree.map(lambda x: _at(x, positions), judgement.teacher)
    logits = jnp.matmul(
        teacher.last,
        judgement.teacher_head.astype(teacher.last.dtype),
        preferred_element_type=jnp.float32,
    )
    best = judgement.target_to_draft[teacher.best]
    judge = Judge.of(soft_cap(logits, how.softcap), teacher.log_norm, best)
    loss, results, d_head = judged(
        eagle3.head_input(params, dims, states),
        params["lm_head"],
        d_head,
        judge,
        jnp.where(rows >= 0, judgement.weights[:, rows], 0.0),
        how.loss,
    )
    return loss, (results, d_head), d_keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows that some step judges, in order, R at a time."""

    order: jax.Array  # int32 [blocks * R + K - 1]: places in 0..L-1; -1 behind the last
    count: jax.Array  # int32: blocks with a row
    size: int = dataclasses.field(metadata={"static": True})  # R
    most: int = dataclasses.field(metadata={"static": True})  # blocks, were every row judged

    @classmethod
    def of(cls, aligned: jax.Array, row_block: int) -> Blocks:
        """aligned bool [K, L]"""
        K, length = aligned.shape
        size = min(row_block, length)
        order = jnp.nonzero(aligned.any(0), size=length, fill_value=-1)[0].astype(jnp.int32)
        count = -(-(order >= 0).sum() // size)
        order = jnp.pad(order, (0, -length % size + K - 1), constant_values=-1)
        return cls(order, count, size, -(-length // size))

    def rows(self, i: jax.Array, behind: int = 0) -> jax.Array:
        """Those of block i, and so many behind them."""
        return jax.lax.dynamic_slice_in_dim(self.order, i * self.size, self.size + behind)

    def over(self, body, carry):
        """carry = body(i, carry) for every block with a row."""
        return counted_loop("rollout_blocks", 0, self.count, body, carry, self.most)


def _at(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x[rows], of the last one where rows end and of any where there is none."""
    return x[jnp.clip(rows, 0, len(x) - 1)]


def _place(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Where to write rows of x: -1 is behind its end, where writing is dropped."""
    return jnp.where(rows < 0, len(x), rows)


def _nothing(weights: jax.Array) -> RowResults:
    zeros = jnp.zeros_like(weights)
    return RowResults(zeros, zeros, zeros.astype(bool), zeros)


def _put(results: RowResults, rows: jax.Array, found: RowResults) -> RowResults:
    place = _place(rows, results.loss[0])
    return jax.tree.map(
        lambda x, new: x.at[: len(new), place].set(new, mode="drop"), results, found
    )
