"""One optimizer step, and one evaluation step, as jitted programs.

    observe     the frozen target reads every micro-batch: features, teacher            (targets/)
    count       rows that count, over the whole step: the loss's denominators           (drafts/)
    gradients   rollout and loss of the rows that are judged, on each device its own    (drafts/)
    update      clip, AdamW or Muon, schedule; float32 masters and moments              (optax)

Dividing each step's loss by rows counted over all micro-batches and devices needs the target's
argmax everywhere before the first gradient. So the target runs first, over all of them. The target
is split as XLA sees fit from its weights' sharding; the head is not left to it: each device has the
whole head and its own rows, and all that devices exchange is counts and the gradient's sum.
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
from MaxDraft.drafts import alignment, losses, metrics
from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.drafts.eagle3.head import HeadDims
from MaxDraft.drafts.eagle3.rollout import Tokens
from MaxDraft.drafts.losses import Teacher
from MaxDraft.drafts.training_pass import (
    Blocks,
    Judgement,
    PassDims,
    judge_rows,
    loss_and_gradient,
)
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
    optimizer_state_shardings,
)
from MaxDraft.pyconfig import Config, ConfigError
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftFrozen:
    """What of it judges the draft, whole on every device."""

    teacher_head: jax.Array  # [H, D]: the target's LM head, draft tokens only
    target_to_draft: jax.Array  # int32 [V], -1: outside the draft vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What the target says of a batch."""

    embeddings: jax.Array  # [..., B, T, H]
    features: jax.Array  # [..., B, T, 3H]
    teacher: Teacher


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, all of it saved in a checkpoint."""

    step: jax.Array  # int32, optimizer steps done
    params: Tree  # of the head, float32
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Parts:
    """What `train` is made of, each a program of its own, to be measured alone."""

    target: Callable[[Frozen, Batch], Seen]
    draft: Callable[[TrainState, Batch, Seen, Frozen], tuple[Tree, jax.Array, dict[str, jax.Array]]]
    optimizer: Callable[[TrainState, Tree, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions of a run, and where their arguments live."""

    initialize: Callable[[Tree | None], TrainState]
    train: Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Tree, Frozen, Batch], dict[str, jax.Array]]
    parts: Parts
    abstract_state: TrainState  # shapes, dtypes and shardings, to restore into
    batch_sharding: NamedSharding


def attention_kernel(config: Config, mesh: Mesh) -> str:
    """-> one of attention.IMPLEMENTATIONS; ConfigError where the mesh's devices have no such."""
    if config.attention == "blockwise":
        return "xla"
    platform = mesh.devices.flat[0].platform
    if platform not in ("tpu", "gpu"):
        raise ConfigError(
            f"attention=pallas: these kernels are a TPU's or a GPU's, and the devices are "
            f"of platform {platform}; write attention=blockwise"
        )
    if config.attention_block_size not in (128, 256, 512):  # 512: what VMEM has room for
        raise ConfigError(
            f"attention=pallas needs an attention_block_size of 128, 256 or 512, and it is "
            f"{config.attention_block_size}"
        )
    return platform


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
    optimizer_config = OptimizerConfig.from_config(config)
    schedule = learning_rate_schedule(optimizer_config, total_steps)
    table = eagle3.head_params(head_dims)
    optimizer = make_optimizer(optimizer_config, schedule, table)
    rules = config.logical_axis_rules
    placement = parameters.shardings(table, mesh, rules)
    kernel = attention_kernel(config, mesh)
    options = None
    if mesh.devices.flat[0].platform == "cpu":
        # A CPU multiplies bfloat16 as float32. Were that conversion moved out of the scan over
        # layers, as this pass does, the weights of all layers would lie there in float32.
        options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    how = PassDims(
        ttt_length=config.ttt_length,
        loss=config.loss,
        row_block=config.rollout_block_size,
        attention_block=config.attention_block_size,
        attention_kernel=kernel,
        softcap=target_dims.logit_softcap,
    )
    split_batch = sharding.named_sharding(mesh, rules, (None, "draft_batch", None)).spec

    def observe(frozen: Frozen, batch: Batch) -> Seen:
        embeddings, features, last = decoder.features(
            frozen.target,
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            target_dims,
            capture,
            dtype,
            config.attention_block_size,
            kernel,
        )
        aligned = aligned_rows(batch)
        best, log_norm = decoder.full_vocabulary(
            frozen.target,
            target_dims,
            last,
            alignment.teacher_positions(aligned),
            config.vocab_block_size,
        )
        # From here on the batch is split over every device, whatever split the target.
        return jax.tree.map(
            lambda x: constrain(x, "draft_batch", *(None,) * (x.ndim - 1)),
            Seen(embeddings, features, Teacher(last, best, log_norm)),
        )

    def aligned_rows(batch: Batch) -> jax.Array:
        return alignment.aligned_rows(
            batch["turn_ids"], batch["segment_ids"], config.ttt_length, config.loss_alignment
        )

    def on_this_device(batch: Batch, seen: Seen, frozen: DraftFrozen):
        """-> tokens, judgement, aligned and counted rows of all micro-batches.

        [A, b, T] laid end to end.
        """
        batch, seen = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch, seen))
        tokens = Tokens.of(seen.embeddings, seen.features, batch["positions"], batch["segment_ids"])
        aligned = aligned_rows(batch)
        counted = aligned & losses.teacher_in_vocabulary(
            seen.teacher.best, frozen.target_to_draft >= 0, config.ttt_length
        )
        aligned, counted = (x.reshape(len(x), -1) for x in (aligned, counted))
        blocks = Blocks.of(aligned, how.row_block)
        if config.loss_denominator == "specforge":
            denominators = jnp.full(config.ttt_length, counted.shape[1], jnp.float32)
        else:
            denominators = counted.sum(1).astype(jnp.float32)
        denominators = jax.lax.psum(denominators, mesh.axis_names)
        weights = losses.row_weights(counted, denominators, config.ttt_loss_decay)
        teacher = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen.teacher)
        judgement = Judgement(teacher, frozen.teacher_head, frozen.target_to_draft, blocks, weights)
        return tokens, judgement, aligned, counted

    def everywhere_at_once(function: Callable, out_specs: Any) -> Callable:
        """function(batch, seen, *rest) on each device, its batch and the whole of the rest."""

        def alone(batch, seen, rest):
            with sharding.on_each_device():
                return function(batch, seen, *rest)

        mapped = jax.shard_map(
            alone,
            mesh=mesh,
            in_specs=(split_batch, split_batch, PartitionSpec()),
            out_specs=out_specs,
            check_vma=False,
        )
        return lambda batch, seen, *rest: mapped(batch, seen, rest)

    def gradients_on_this_device(batch: Batch, seen: Seen, params: Tree, frozen: DraftFrozen):
        tokens, judgement, aligned, counted = on_this_device(batch, seen, frozen)
        loss, gradient, results = loss_and_gradient(params, head_dims, tokens, judgement, how)
        gradient = jax.tree.map(
            lambda g, place: sharding.scatter_sum(g, mesh, place.spec), gradient, placement
        )
        sums = metrics.sums(results, aligned, counted)
        return gradient, *jax.lax.psum((loss, sums), mesh.axis_names)

    def judged_on_this_device(batch: Batch, seen: Seen, params: Tree, frozen: DraftFrozen):
        tokens, judgement, aligned, counted = on_this_device(batch, seen, frozen)
        results = judge_rows(params, head_dims, tokens, judgement, how)
        return jax.lax.psum(metrics.sums(results, aligned, counted), mesh.axis_names)

    def for_the_draft(frozen: Frozen) -> DraftFrozen:
        ids = frozen.draft_to_target
        places = jnp.full(target_dims.vocab_size, -1, jnp.int32)
        places = places.at[ids].set(jnp.arange(len(ids), dtype=jnp.int32))
        return DraftFrozen(decoder.draft_head_weight(frozen.target, ids), places)

    def seen_by_target(frozen: Frozen, batch: Batch) -> Seen:
        return jax.lax.map(lambda micro: observe(frozen, micro), batch)

    def gradients(state: TrainState, batch: Batch, seen: Seen, frozen: Frozen):
        """-> gradient where the parameters lie, loss, metrics.sums."""
        places = jax.tree.map(lambda place: place.spec, placement)
        return everywhere_at_once(
            gradients_on_this_device, (places, PartitionSpec(), PartitionSpec())
        )(batch, seen, state.params, for_the_draft(frozen))

    def update(state: TrainState, gradient: Tree, loss: jax.Array):
        """-> new state, and what the step says of it."""
        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        gradient_norm = optax.tree.norm(gradient)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), new_optimizer)
        finite = jnp.isfinite(loss + gradient_norm + optax.tree.norm(new.params))
        # A step that is not finite changes nothing but the step number.
        kept = dataclasses.replace(state, step=state.step + 1)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
        return new, {
            "total_loss": loss,
            "gradient_norm": gradient_norm,
            "finite": finite,
            "learning_rate": schedule(state.step),
        }

    def train(state: TrainState, frozen: Frozen, batch: Batch):
        seen = seen_by_target(frozen, batch)
        gradient, loss, sums = gradients(state, batch, seen, frozen)
        new, said = update(state, gradient, loss)
        return new, sums | said | {"tokens": (batch["segment_ids"] > 0).sum()}

    def evaluate(params: Tree, frozen: Frozen, batch: Batch) -> dict[str, jax.Array]:
        return everywhere_at_once(judged_on_this_device, PartitionSpec())(
            batch, seen_by_target(frozen, batch), params, for_the_draft(frozen)
        )

    def initialize(params: Tree | None) -> TrainState:
        if params is None:
            params = parameters.initialize(table, config.init_weights_seed)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    everywhere = NamedSharding(mesh, PartitionSpec())
    state_shardings = TrainState(
        step=everywhere,
        params=placement,
        optimizer=optimizer_state_shardings(
            jax.eval_shape(optimizer.init, parameters.abstract(table)), placement, everywhere
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
            under_rules(train),
            donate_argnums=0,
            out_shardings=(state_shardings, everywhere),
            compiler_options=options,
        ),
        evaluate=jax.jit(under_rules(evaluate), out_shardings=everywhere, compiler_options=options),
        parts=Parts(
            target=jax.jit(under_rules(seen_by_target), compiler_options=options),
            draft=jax.jit(under_rules(gradients), compiler_options=options),
            optimizer=jax.jit(
                under_rules(update), donate_argnums=0, out_shardings=(state_shardings, everywhere)
            ),
        ),
        abstract_state=jax.tree.map(
            lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
            jax.eval_shape(initialize, None),
            state_shardings,
        ),
        batch_sharding=sharding.named_sharding(mesh, rules, (None, "draft_batch", None)),
    )
