"""One optimizer step, and one evaluation step, as plain functions over a frozen spec.

    target_outputs     the frozen target reads every micro-batch: hidden states, teacher (targets/)
    loss_and_gradient  on each device its own tokens: masks, drafts, loss, gradient      (drafts/)
    update             clip, AdamW or Muon, schedule; float32 masters and moments         (optax)

The loss is divided by the number of supervised positions of the whole step, and that number depends
on the target's argmax. So the target runs over all micro-batches first. XLA splits the target as
its weights' shardings say. The drafter is not left to XLA: before its part the head's parameters
and the target's LM-head columns are gathered, every device then works on its own tokens with the
whole head, and what they exchange is counts and summed gradients. compile_step.py makes these
functions programs: shardings, donation, options.

A micro-batches, B rows, T tokens in a packed row, L = A * B * T / devices tokens of a device,
K drafts of a position, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from MaxDraft import sharding
from MaxDraft.drafts import alignment, metrics, training_pass
from MaxDraft.drafts.drafter import Drafter, DraftInputs, LossConfig
from MaxDraft.drafts.training_pass import (
    PositionBlocks,
    ReplicatedTeacher,
    RolloutConfig,
    Supervision,
)
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.sharding import constrain
from MaxDraft.targets.feature_source import BatchField, FeatureSource, TargetOutputs

Batch = Mapping[str, jax.Array]  # [A, B, T, ...] by the names of `batch_fields`
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """All that decides what a step computes, and where. Hashable; holds no arrays."""

    drafter: Drafter
    source: FeatureSource
    loss: LossConfig
    rollout: RolloutConfig
    mesh: Mesh
    rules: sharding.Rules

    @property
    def num_steps(self) -> int:
        """K"""
        return self.drafter.num_steps(self.loss)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenParams:
    """What a step reads and never changes."""

    source: Tree  # the feature source's parameters: the target's weights
    draft_to_target: jax.Array  # int32 [D] target ids of the draft vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, all of it saved in a checkpoint."""

    step: jax.Array  # int32, optimizer steps done
    params: Tree  # of the drafter, float32
    optimizer: Any


# ------------------------------------------------------------------------------------- the step
def train_step(
    spec: StepSpec,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    frozen: FrozenParams,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One optimizer step -> the new state, and sums and numbers of the step for the log."""
    outputs = target_outputs(spec, frozen, batch)
    loss, gradient, sums = loss_and_gradient(spec, state.params, frozen, batch, outputs)
    state, numbers = update(optimizer, schedule, state, loss, gradient)
    return state, sums | numbers | {"tokens": (batch["segment_ids"] > 0).sum()}


def evaluation_step(spec: StepSpec, params: Tree, frozen: FrozenParams, batch: Batch) -> Metrics:
    """The metric sums of train_step without gradient or update; metrics.finish divides them."""
    outputs = target_outputs(spec, frozen, batch)

    def on_device(batch, outputs, params, teacher):
        inputs, supervision, masks = device_inputs(spec, batch, outputs, teacher)
        results = training_pass.evaluate_positions(
            spec.drafter, params, inputs, supervision, spec.rollout
        )
        return jax.lax.psum(metrics.sums(results, *masks), spec.mesh.axis_names)

    teacher = replicated_teacher(spec, frozen)
    return on_every_device(spec, on_device, PartitionSpec())(batch, outputs, params, teacher)


# --------------------------------------------------------------------------- 1. the target's part
def target_outputs(spec: StepSpec, frozen: FrozenParams, batch: Batch) -> TargetOutputs:
    """What the feature source says of every micro-batch: arrays [A, B, T, ...]."""

    def of_micro_batch(micro_batch: Batch) -> TargetOutputs:
        mask = loss_mask(spec, micro_batch)
        outputs = spec.source.outputs(frozen.source, micro_batch, alignment.teacher_mask(mask))
        # The target may be split differently; from here on the batch is split over all devices.
        return jax.tree.map(lambda x: constrain(x, "draft_batch", *(None,) * (x.ndim - 1)), outputs)

    return jax.lax.map(of_micro_batch, batch)


def loss_mask(spec: StepSpec, batch: Batch) -> jax.Array:
    """bool [K, B, T]: positions whose k-th draft is supervised, whatever the draft vocabulary."""
    return spec.drafter.loss_mask(batch["turn_ids"], batch["segment_ids"], spec.loss)


def replicated_teacher(spec: StepSpec, frozen: FrozenParams) -> ReplicatedTeacher:
    """The target's LM-head columns of the draft vocabulary, target id -> draft id, and the rest."""
    ids = frozen.draft_to_target
    target_to_draft = jnp.full(spec.source.vocab_size, -1, jnp.int32)
    target_to_draft = target_to_draft.at[ids].set(jnp.arange(len(ids), dtype=jnp.int32))
    special_ids = jnp.asarray(spec.drafter.special_token_ids, jnp.int32)
    return ReplicatedTeacher(
        lm_head=spec.source.teacher_lm_head(frozen.source, ids),
        target_to_draft=target_to_draft,
        special_embeddings=spec.source.embed(frozen.source, special_ids),
        logit_softcap=spec.source.logit_softcap,
    )


# -------------------------------------------------------------------------- 2. the drafter's part
def loss_and_gradient(
    spec: StepSpec, params: Tree, frozen: FrozenParams, batch: Batch, outputs: TargetOutputs
) -> tuple[jax.Array, Tree, Metrics]:
    """-> loss summed over all devices, gradient sharded like the parameters, metrics.sums."""
    placement = param_shardings(spec)

    def on_device(batch, outputs, params, teacher):
        inputs, supervision, masks = device_inputs(spec, batch, outputs, teacher)
        loss, gradient, results = training_pass.loss_and_gradient(
            spec.drafter, params, inputs, supervision, spec.rollout
        )
        gradient = jax.tree.map(
            lambda g, place: sharding.scatter_sum(g, spec.mesh, place.spec), gradient, placement
        )
        sums = metrics.sums(results, *masks)
        loss, sums = jax.lax.psum((loss, sums), spec.mesh.axis_names)
        return loss, gradient, sums

    gradient_specs = jax.tree.map(lambda place: place.spec, placement)
    out_specs = (PartitionSpec(), gradient_specs, PartitionSpec())
    teacher = replicated_teacher(spec, frozen)
    return on_every_device(spec, on_device, out_specs)(batch, outputs, params, teacher)


def device_inputs(
    spec: StepSpec, batch: Batch, outputs: TargetOutputs, teacher: ReplicatedTeacher
) -> tuple[DraftInputs, Supervision, tuple[jax.Array, jax.Array]]:
    """A device's micro-batches [A, b, T] flattened to [L].

    -> what the drafter reads, what supervises it, and (loss_mask, in_vocab_loss_mask) bool [K, L].
    """
    batch, outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch, outputs))
    inputs = DraftInputs.from_rows(
        outputs.embeddings,
        outputs.aux_hidden_states,
        batch["positions"],
        batch["segment_ids"],
        teacher.special_embeddings,
    )
    mask = loss_mask(spec, batch)
    in_vocab_mask = mask & alignment.teacher_in_vocab(
        outputs.teacher.argmax, teacher.target_to_draft >= 0, spec.num_steps
    )
    mask, in_vocab_mask = (x.reshape(len(x), -1) for x in (mask, in_vocab_mask))
    totals = spec.drafter.loss_totals(in_vocab_mask, spec.loss)
    totals = jax.lax.psum(totals, spec.mesh.axis_names)
    supervision = Supervision(
        outputs=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs.teacher),
        teacher=teacher,
        blocks=PositionBlocks.from_loss_mask(mask, spec.rollout.position_block),
        weights=spec.drafter.loss_weights(in_vocab_mask, totals, spec.loss),
        loss=spec.loss.loss,
    )
    return inputs, supervision, (mask, in_vocab_mask)


def on_every_device(spec: StepSpec, function: Callable, out_specs: Any) -> Callable:
    """function(batch, outputs, params, teacher) in a shard_map over all mesh axes.

    batch and outputs are split by rows, params and teacher are replicated.
    """
    rows = sharding.named_sharding(spec.mesh, spec.rules, (None, "draft_batch", None)).spec

    def on_device(*args):
        with sharding.on_each_device():
            return function(*args)

    return jax.shard_map(
        on_device,
        mesh=spec.mesh,
        in_specs=(rows, rows, PartitionSpec(), PartitionSpec()),
        out_specs=out_specs,
        check_vma=False,
    )


# ------------------------------------------------------------------------------------ 3. the update
def update(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    loss: jax.Array,
    gradient: Tree,
) -> tuple[TrainState, Metrics]:
    """-> new state, and the step's numbers.

    A step whose loss, gradient or new parameters are not finite leaves parameters and optimizer as
    they are, and only advances `step`.
    """
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    gradient_norm = optax.tree.norm(gradient)
    params = optax.apply_updates(state.params, updates)
    new = TrainState(state.step + 1, params, optimizer_state)
    finite = jnp.isfinite(loss + gradient_norm + optax.tree.norm(new.params))
    unchanged = dataclasses.replace(state, step=state.step + 1)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, unchanged)
    return new, {
        "total_loss": loss,
        "gradient_norm": gradient_norm,
        "finite": finite,
        "learning_rate": schedule(state.step),
    }


# ------------------------------------------------------------------------ what a step works on
def batch_fields(spec: StepSpec) -> dict[str, BatchField]:
    """The arrays of a batch: those that the step reads itself, and those of the source.

    turn_ids: 0 where the assistant did not write, else the turn; segment_ids: 0 at pads, else the
    document; positions: inside the document.
    """
    own = {name: BatchField() for name in ("segment_ids", "positions", "turn_ids")}
    return own | dict(spec.source.batch_fields())


def param_shardings(spec: StepSpec) -> Tree:
    """Tree of NamedSharding of the drafter's parameters."""
    return parameters.shardings(spec.drafter.params_table(), spec.mesh, spec.rules)


def initial_state(
    spec: StepSpec, optimizer: optax.GradientTransformation, params: Tree | None, seed: int
) -> TrainState:
    """Step 0, from parameters or where they are None from a seed."""
    if params is None:
        params = parameters.initialize(spec.drafter.params_table(), seed)
    return TrainState(jnp.int32(0), params, optimizer.init(params))
