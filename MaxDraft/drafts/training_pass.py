"""Loss, gradient and metrics of the tokens of one device: a block of positions at a time.

    every token           step-0 state, keys and values                        (drafter.per_token)
    block of positions    those that some step supervises, R at a time:
                          K drafts -> loss -> gradient of everything the block read
    every token           the gradients of states, keys and values go back to the parameters

Positions that no step supervises are never drafted from: the supervised ones are put first, and
the loop ends with the last of them. The work is that of the supervised positions, rounded up to a
block, whatever share of the batch they are; nothing can overflow. Activations exist for one block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from MaxDraft.drafts.drafter import Drafter, DraftInputs
from MaxDraft.drafts.losses import PositionResults, TeacherTargets, fused_linear_cross_entropy
from MaxDraft.layers.attention_keys import KeyValueBlocks
from MaxDraft.layers.loops import counted_loop
from MaxDraft.layers.norms import soft_cap
from MaxDraft.layers.params import Tree
from MaxDraft.targets.feature_source import TeacherOutputs


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How the pass computes; none of it changes what is computed."""

    position_block: int = 512  # R, positions drafted from at a time
    attention_block: int = 256  # queries and keys attended at a time
    attention_kernel: str = "xla"  # one of attention.IMPLEMENTATIONS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplicatedTeacher:
    """The target's weights that the drafter and the loss read, whole on every device."""

    lm_head: jax.Array  # [H, D]: the target's LM head, draft tokens only
    target_to_draft: jax.Array  # int32 [V], -1: outside the draft vocabulary
    special_embeddings: jax.Array  # [S, H] of the drafter's special_token_ids
    logit_softcap: float = dataclasses.field(metadata={"static": True})  # the target's; 0: none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Supervision:
    """What supervises the L tokens of a device."""

    outputs: TeacherOutputs  # [L, ...]
    teacher: ReplicatedTeacher
    blocks: PositionBlocks  # of the positions that some step supervises
    weights: jax.Array  # float32 [K, L] of each position's loss in the total; 0: not supervised
    loss: str = dataclasses.field(metadata={"static": True})  # one of losses.LOSSES


def evaluate_positions(
    drafter: Drafter,
    params: Tree,
    inputs: DraftInputs,
    supervision: Supervision,
    config: RolloutConfig,
) -> PositionResults:
    """-> results [K, L] of the supervised positions; zeros elsewhere."""
    state, keys_values = drafter.per_token(params, inputs)
    keys = _blocked_keys(keys_values, inputs, config)
    blocks = supervision.blocks

    def of_block(i, results):
        positions = blocks.positions(i)
        _, (of_positions, _), _ = _block_loss(
            drafter, params, _at(state, positions), keys, None, None, inputs, supervision, i
        )
        return _put(results, positions, of_positions)

    return blocks.for_each(of_block, _no_results(supervision.weights))


def loss_and_gradient(
    drafter: Drafter,
    params: Tree,
    inputs: DraftInputs,
    supervision: Supervision,
    config: RolloutConfig,
) -> tuple[jax.Array, Tree, PositionResults]:
    """-> sum of weights * loss, its gradient, float32 like params, and the positions' results."""
    (state, keys_values), pull_back = jax.vjp(
        lambda params: drafter.per_token(params, inputs), params
    )
    keys = _blocked_keys(keys_values, inputs, config)
    blocks = supervision.blocks

    def of_block(i, carry):
        loss, gradient, d_lm_head, d_state, d_keys, results = carry
        positions = blocks.positions(i)

        def block(params, state, d_keys):
            loss, aux, d_keys = _block_loss(
                drafter, params, state, keys, d_keys, d_lm_head, inputs, supervision, i
            )
            return (loss, d_keys), aux

        (block_loss, _), block_pull_back, (of_positions, d_lm_head) = jax.vjp(
            block, params, _at(state, positions), d_keys, has_aux=True
        )
        # The cotangent that is passed in for d_keys is their gradient so far; the one that comes
        # back is the new sum (see attention.interval_attention).
        d_params, d_state_block, d_keys = block_pull_back((jnp.ones_like(block_loss), d_keys))
        return (
            loss + block_loss,
            _add_all_but_lm_head(gradient, d_params),
            d_lm_head,
            d_state.at[_write_index(positions, state)].set(d_state_block, mode="drop"),
            d_keys,
            _put(results, positions, of_positions),
        )

    # Blocks' gradients are added up in float32.
    zeros = jax.tree.map(jnp.zeros_like, params)
    d_lm_head = zeros.pop("lm_head") if drafter.trains_lm_head else None
    carry = (
        jnp.float32(0),
        zeros,
        d_lm_head,
        jnp.zeros_like(state),
        tuple(layer.zeros() for layer in keys),
        _no_results(supervision.weights),
    )
    loss, gradient, d_lm_head, d_state, d_keys, results = blocks.for_each(of_block, carry)
    d_keys_values = tuple(
        tuple(d.astype(x.dtype) for d, x in zip(layer.arrays(len(state)), like, strict=True))
        for layer, like in zip(d_keys, keys_values, strict=True)
    )
    [d_params] = pull_back((d_state, d_keys_values))
    gradient = _add_all_but_lm_head(gradient, d_params)
    if drafter.trains_lm_head:
        gradient = {**gradient, "lm_head": d_lm_head}
    return loss, gradient, results


def _blocked_keys(
    keys_values, inputs: DraftInputs, config: RolloutConfig
) -> tuple[KeyValueBlocks, ...]:
    return tuple(
        KeyValueBlocks.from_arrays(
            k, v, config.attention_block, inputs.row_length, config.attention_kernel
        )
        for k, v in keys_values
    )


def _add_all_but_lm_head(total: Tree, gradient: Tree) -> Tree:
    """Sums all gradients but the LM head's, which fused_linear_cross_entropy accumulates."""
    gradient = {name: part for name, part in gradient.items() if name != "lm_head"}
    return jax.tree.map(jnp.add, total, gradient)


def _block_loss(
    drafter: Drafter,
    params: Tree,
    state: jax.Array,  # [R, H]
    keys: tuple[KeyValueBlocks, ...],
    d_keys: tuple[KeyValueBlocks, ...] | None,  # so far, see attention.interval_attention
    d_lm_head: jax.Array | None,  # so far, see losses.fused_linear_cross_entropy
    inputs: DraftInputs,
    supervision: Supervision,
    i: jax.Array,
) -> tuple[jax.Array, tuple[PositionResults, jax.Array | None], tuple[KeyValueBlocks, ...] | None]:
    """Loss of block i, the results of its positions [K, R] with d_lm_head, and d_keys."""
    positions = supervision.blocks.positions(i)
    K, teacher = len(supervision.weights), supervision.teacher
    hidden, d_keys = drafter.draft_block(params, state, keys, d_keys, inputs, positions, K)
    loss, results, d_lm_head = fused_linear_cross_entropy(
        hidden,
        params["lm_head"] if drafter.trains_lm_head else teacher.lm_head,
        d_lm_head,
        _teacher_targets(supervision, i),
        jnp.where(positions >= 0, supervision.weights[:, positions], 0.0),
        supervision.loss,
    )
    return loss, (results, d_lm_head), d_keys


def _teacher_targets(supervision: Supervision, i: jax.Array) -> TeacherTargets:
    """Teachers of the R positions of block i, and of the K - 1 supervised ones that follow."""
    K, teacher = len(supervision.weights), supervision.teacher
    # The teacher of position i at step 0 stands at i + 1.
    places = supervision.blocks.positions(i, followers=K - 1) + 1
    outputs = jax.tree.map(lambda x: _at(x, places), supervision.outputs)
    logits = jnp.matmul(
        outputs.last_hidden_state,
        teacher.lm_head.astype(outputs.last_hidden_state.dtype),
        preferred_element_type=jnp.float32,
    )
    return TeacherTargets.from_logits(
        soft_cap(logits, teacher.logit_softcap),
        outputs.logsumexp,
        teacher.target_to_draft[outputs.argmax],
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionBlocks:
    """Positions that some step supervises, in order, R at a time."""

    order: jax.Array  # int32 [blocks * R + K - 1]: places in 0..L-1; -1 past the last
    count: jax.Array  # int32: blocks that hold a position
    size: int = dataclasses.field(metadata={"static": True})  # R
    max_count: int = dataclasses.field(metadata={"static": True})  # were every token supervised

    @classmethod
    def from_loss_mask(cls, loss_mask: jax.Array, size: int) -> PositionBlocks:
        """loss_mask bool [K, L]; size: R, at most L."""
        K, length = loss_mask.shape
        size = min(size, length)
        order = jnp.nonzero(loss_mask.any(0), size=length, fill_value=-1)[0].astype(jnp.int32)
        count = -(-(order >= 0).sum() // size)
        order = jnp.pad(order, (0, -length % size + K - 1), constant_values=-1)
        return cls(order, count, size, -(-length // size))

    def positions(self, i: jax.Array, followers: int = 0) -> jax.Array:
        """int32 [R + followers]: those of block i, and so many supervised ones that follow."""
        return jax.lax.dynamic_slice_in_dim(self.order, i * self.size, self.size + followers)

    def for_each(self, body, carry):
        """carry = body(i, carry) for every block that holds a position."""
        return counted_loop("rollout_blocks", 0, self.count, body, carry, self.max_count)


def _at(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x[positions]. -1 reads the first, places past the end the last: their weight is zero."""
    return x[jnp.clip(positions, 0, len(x) - 1)]


def _write_index(positions: jax.Array, x: jax.Array) -> jax.Array:
    """Where to write positions of x: -1 becomes the index past the end, where mode="drop" drops."""
    return jnp.where(positions < 0, len(x), positions)


def _no_results(weights: jax.Array) -> PositionResults:
    zeros = jnp.zeros_like(weights)
    return PositionResults(zeros, zeros, zeros.astype(bool), zeros)


def _put(
    results: PositionResults, positions: jax.Array, of_positions: PositionResults
) -> PositionResults:
    place = _write_index(positions, results.loss[0])
    return jax.tree.map(lambda x, new: x.at[:, place].set(new, mode="drop"), results, of_positions)
