"""The step's functions as programs for a mesh: shardings, donated state, compiler options.

Nothing is compiled before a program is first called or lowered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from MaxDraft import sharding, train_step
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.optimizer import optimizer_state_shardings
from MaxDraft.targets.feature_source import TargetOutputs
from MaxDraft.train_step import Batch, FrozenParams, Metrics, StepSpec, TrainState


@dataclasses.dataclass(frozen=True)
class TrainingPrograms:
    """The jitted functions of a training run.

    `train` is the fused step; target, draft and update are the same three calls compiled
    separately, for timing.
    """

    initialize: Callable[[Tree | None], TrainState]
    train: Callable[[TrainState, FrozenParams, Batch], tuple[TrainState, Metrics]]
    target: Callable[[FrozenParams, Batch], TargetOutputs]
    draft: Callable[[Tree, FrozenParams, Batch, TargetOutputs], tuple[jax.Array, Tree, Metrics]]
    update: Callable[[TrainState, jax.Array, Tree], tuple[TrainState, Metrics]]
    abstract_state: TrainState  # shapes, dtypes and shardings, to restore into


def training_programs(
    spec: StepSpec,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    init_weights_seed: int = 0,
) -> TrainingPrograms:
    """The training step of a spec and its parts."""
    abstract = abstract_state(spec, optimizer)
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract)
    new_state = {
        "donate_argnums": 0,
        "out_shardings": (state_shardings, NamedSharding(spec.mesh, PartitionSpec())),
    }
    options = _compiler_options(spec)

    def initialize(params: Tree | None) -> TrainState:
        return train_step.initial_state(spec, optimizer, params, init_weights_seed)

    def train(state, frozen, batch):
        return train_step.train_step(spec, optimizer, schedule, state, frozen, batch)

    def target(frozen, batch):
        return train_step.target_outputs(spec, frozen, batch)

    def draft(params, frozen, batch, outputs):
        return train_step.loss_and_gradient(spec, params, frozen, batch, outputs)

    def update(state, loss, gradient):
        return train_step.update(optimizer, schedule, state, loss, gradient)

    return TrainingPrograms(
        initialize=_program(spec, initialize, out_shardings=state_shardings),
        train=_program(spec, train, compiler_options=options, **new_state),
        target=_program(spec, target, compiler_options=options),
        draft=_program(spec, draft, compiler_options=options),
        update=_program(spec, update, **new_state),
        abstract_state=abstract,
    )


def evaluation_program(spec: StepSpec) -> Callable[[Tree, FrozenParams, Batch], Metrics]:
    """The evaluation step of a spec."""

    def evaluate(params, frozen, batch):
        return train_step.evaluation_step(spec, params, frozen, batch)

    everywhere = NamedSharding(spec.mesh, PartitionSpec())
    options = _compiler_options(spec)
    return _program(spec, evaluate, compiler_options=options, out_shardings=everywhere)


def _program(spec: StepSpec, function: Callable, **settings: Any) -> Callable:
    """function, jitted, with the spec's axis rules while it is traced."""

    def under_rules(*args):
        with sharding.axis_rules(spec.mesh, spec.rules):
            return function(*args)

    under_rules.__name__ = function.__name__
    return jax.jit(under_rules, **settings)


def _compiler_options(spec: StepSpec) -> dict[str, Any] | None:
    if spec.mesh.devices.flat[0].platform != "cpu":
        return None
    # A CPU multiplies bfloat16 as float32. Were that conversion moved out of the scan over layers,
    # as this pass does, the weights of all layers would lie there in float32.
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def abstract_state(spec: StepSpec, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState, to restore into or to compile for."""
    table = spec.drafter.params_table()
    shapes = jax.eval_shape(lambda: train_step.initial_state(spec, optimizer, None, seed=0))
    everywhere = NamedSharding(spec.mesh, PartitionSpec())
    placement = train_step.param_shardings(spec)
    shardings = TrainState(
        step=everywhere,
        params=placement,
        optimizer=optimizer_state_shardings(
            jax.eval_shape(optimizer.init, parameters.abstract(table)), placement, everywhere
        ),
    )
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        shapes,
        shardings,
    )


def abstract_frozen(spec: StepSpec, table: Tree) -> FrozenParams:
    """Shapes and shardings of what a step reads; table: the source's parameters as they lie."""
    everywhere = NamedSharding(spec.mesh, PartitionSpec())
    placement = parameters.shardings(table, spec.mesh, spec.rules)
    size = spec.drafter.draft_vocab_size or spec.source.vocab_size
    ids = jax.ShapeDtypeStruct((size,), "int32", sharding=everywhere)
    return FrozenParams(parameters.abstract(table, placement), ids)


def abstract_batch(spec: StepSpec, A: int, B: int, T: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a global batch of A micro-batches of B rows of T tokens."""
    places = batch_shardings(spec)
    return {
        name: jax.ShapeDtypeStruct((A, B, T, *field.shape), field.dtype, sharding=places[name])
        for name, field in train_step.batch_fields(spec).items()
    }


def batch_shardings(spec: StepSpec) -> dict[str, NamedSharding]:
    """Where each array of a batch lies."""
    return {
        name: sharding.named_sharding(spec.mesh, spec.rules, field.axes)
        for name, field in train_step.batch_fields(spec).items()
    }
