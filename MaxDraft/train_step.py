"""One optimizer step, and one evaluation step, as jitted programs.

    observe     the frozen target reads every micro-batch: features, teacher            (targets/)
    count       rows that count, over the whole step: the loss's denominators           (drafts/)
    gradients   rollout and loss of each micro-batch, summed by a scan                  (drafts/)
    update      clip, AdamW, cosine with warm-up; float32 masters and moments           (optax)

Dividing each step's loss by rows counted over all micro-batches and devices needs the target's
argmax everywhere before the first gradient. So the target runs first, over all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from MaxDraft import sharding
from MaxDraft.drafts import alignment, eagle3, losses, metrics
from MaxDraft.drafts.eagle3 import HeadDims
from MaxDraft.drafts.losses import Teacher
from MaxDraft.drafts.rollout import rollout
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.pyconfig import Config
from MaxDraft.sharding import constrain
from MaxDraft.targets import decoder
from MaxDraft.targets.dims import DecoderDims

Batch = dict[str, jax.Array]  # tokens, segment_ids, positions, turn_ids: int32 [A, B, T]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a step reads and never changes."""

    target: Tree
    draft_to_target: jax.Array  # int32 [D]
    in_vocabulary: jax.Array  # bool [V]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, all of it saved in a checkpoint."""

    step: jax.Array  # int32, optimizer steps done
    params: Tree  # of the head, float32
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions of a run, and where their arguments live."""

    initialize: Callable[[Tree | None], TrainState]
    train: Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Tree, Frozen, Batch], dict[str, jax.Array]]
    abstract_state: TrainState  # shapes, dtypes and shardings, to restore into
    batch_sharding: NamedSharding


def learning_rate_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Linear to the peak over warmup_steps_fraction of the steps, then cosine to 0."""
    warmup = round(config.warmup_steps_fraction * total_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),  # not 0: the first step counts too
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(total_steps, warmup + 1),
    )


def make_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm."""
    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.adam_weight_decay,
    )
    if config.gradient_clipping_threshold == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.gradient_clipping_threshold), adamw)


def make_programs(
    config: Config,
    target_dims: DecoderDims,
    head_dims: HeadDims,
    capture: tuple[int, ...],
    mesh: Mesh,
    total_steps: int,
) -> Programs:
    """Builds the jitted step functions for a mesh; nothing is compiled yet."""
    dtype = jnp.dtype(config.dtype)
    schedule = learning_rate_schedule(config, total_steps)
    optimizer = make_optimizer(config, total_steps)
    table = eagle3.head_params(head_dims)

    def observe(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array, Teacher]:
        embeddings, features, last = decoder.features(
            frozen.target,
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            target_dims,
            capture,
            dtype,
            config.attention_block_size,
        )
        best, log_norm = decoder.full_vocabulary(
            frozen.target, target_dims, last, config.vocab_block_size
        )
        # From here on the batch is split over every device, whatever split the target.
        return jax.tree.map(
            lambda x: constrain(x, "draft_batch", *(None,) * (x.ndim - 1)),
            (embeddings, features, Teacher(last, best, log_norm)),
        )

    def aligned_and_counted(frozen: Frozen, batch: Batch, teacher: Teacher):
        aligned = alignment.aligned_rows(
            batch["turn_ids"], batch["segment_ids"], config.ttt_length, config.loss_alignment
        )
        drawable = losses.teacher_in_vocabulary(
            teacher.best, frozen.in_vocabulary, config.ttt_length
        )
        return aligned, aligned & drawable

    def denominators(counted: jax.Array) -> jax.Array:  # bool [..., K, B, T] -> float32 [K]
        if config.loss_denominator == "specforge":
            return jnp.full(config.ttt_length, counted.size / config.ttt_length, jnp.float32)
        axes = tuple(axis for axis in range(counted.ndim) if axis != counted.ndim - 3)
        return counted.sum(axes).astype(jnp.float32)

    def loss_and_sums(params: Tree, frozen: Frozen, batch: Batch, seen, rows, denominator):
        embeddings, features, teacher = seen
        aligned, counted = rows
        # Gathered once for all steps of the rollout. They are rounded where they are used, so that
        # the gradients of all uses are added up in float32.
        weights = jax.tree.map(lambda w: constrain(w, *(None,) * w.ndim), params)
        states = rollout(
            weights,
            head_dims,
            embeddings,
            features,
            batch["positions"],
            batch["segment_ids"],
            config.ttt_length,
            config.attention_block_size,
        )
        results = losses.judge(
            weights,
            head_dims,
            states,
            teacher,
            decoder.draft_head_weight(frozen.target, frozen.draft_to_target),
            frozen.draft_to_target,
            config.vocab_block_size,
            target_dims.logit_softcap,
        )
        loss = losses.total_loss(results.loss, counted, denominator, config.ttt_loss_decay)
        return loss, metrics.sums(results, aligned, counted)

    def train(state: TrainState, frozen: Frozen, batch: Batch):
        seen = jax.lax.map(lambda micro: observe(frozen, micro), batch)
        rows = jax.lax.map(lambda args: aligned_and_counted(frozen, *args), (batch, seen[2]))
        denominator = denominators(rows[1])

        def add_gradient(total, args):
            (loss, sums), gradient = jax.value_and_grad(loss_and_sums, has_aux=True)(
                state.params, frozen, *args, denominator
            )
            return jax.tree.map(jnp.add, total, gradient), (loss, sums)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        gradient, parts = jax.lax.scan(add_gradient, zeros, (batch, seen, rows))
        loss, sums = jax.tree.map(lambda x: x.sum(0), parts)

        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        gradient_norm = optax.tree.norm(gradient)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), new_optimizer)
        finite = jnp.isfinite(loss + gradient_norm + optax.tree.norm(new.params))
        # A step that is not finite changes nothing but the step number.
        kept = dataclasses.replace(state, step=state.step + 1)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
        return new, sums | {
            "tokens": (batch["segment_ids"] > 0).sum(),
            "total_loss": loss,
            "gradient_norm": gradient_norm,
            "finite": finite,
            "learning_rate": schedule(state.step),
        }

    def evaluate(params: Tree, frozen: Frozen, batch: Batch) -> dict[str, jax.Array]:
        def of_micro_batch(micro):
            seen = observe(frozen, micro)
            rows = aligned_and_counted(frozen, micro, seen[2])
            return loss_and_sums(params, frozen, micro, seen, rows, denominators(rows[1]))[1]

        return jax.tree.map(lambda x: x.sum(0), jax.lax.map(of_micro_batch, batch))

    def initialize(params: Tree | None) -> TrainState:
        if params is None:
            params = parameters.initialize(table, config.init_weights_seed)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    rules = config.logical_axis_rules
    everywhere = NamedSharding(mesh, PartitionSpec())
    placement = parameters.shardings(table, mesh, rules)
    moments = jax.eval_shape(optimizer.init, parameters.abstract(table))
    state_shardings = TrainState(
        step=everywhere,
        params=placement,
        optimizer=optax.tree_map_params(
            optimizer,
            lambda _, place: place,
            moments,
            placement,
            transform_non_params=lambda _: everywhere,
        ),
    )

    def under_rules(function: Callable) -> Callable:
        def wrapped(*args):
            with sharding.axis_rules(mesh, rules):
                return function(*args)

        wrapped.__name__ = function.__name__
        return wrapped

    return Programs(
        initialize=jax.jit(under_rules(initialize), out_shardings=state_shardings),
        train=jax.jit(
            under_rules(train), donate_argnums=0, out_shardings=(state_shardings, everywhere)
        ),
        evaluate=jax.jit(under_rules(evaluate), out_shardings=everywhere),
        abstract_state=jax.tree.map(
            lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
            jax.eval_shape(initialize, None),
            state_shardings,
        ),
        batch_sharding=sharding.named_sharding(mesh, rules, (None, "draft_batch", None)),
    )
