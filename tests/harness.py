"""The bridge from a reference problem (reference.py) to the code under test."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import reference
from jax.sharding import PartitionSpec

from MaxDraft import train_step
from MaxDraft.drafts import losses, metrics, training_pass
from MaxDraft.drafts.drafter import LossConfig
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.drafts.training_pass import PositionBlocks, RolloutConfig
from MaxDraft.layers.params import flatten
from MaxDraft.layers.rope import Rope
from MaxDraft.targets import decoder
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.feature_source import BatchField, TargetOutputs, TeacherOutputs
from MaxDraft.targets.table import decoder_params


def relative_error(ours, theirs):
    """max |ours - theirs| / max |theirs|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def tree_of(table, tensor):
    """Parameter tree of a table; tensor(name) is the checkpoint's array of that name."""

    def load(param):
        def one(name):
            array = tensor(name)
            return array.T if param.transposed else array

        if param.layers is None:
            array = one(param.tensor)
        else:
            array = np.stack([one(param.tensor.format(layer=layer)) for layer in param.layers])
        assert array.shape == param.full_shape, param
        return jnp.asarray(array, param.dtype)

    return jax.tree.map(load, table)


def named(table, tree):
    """The way back: checkpoint name -> array, for trees without stacked layers."""
    return {
        param.tensor: np.asarray(leaf).T if param.transposed else np.asarray(leaf)
        for (_, param), leaf in zip(flatten(table), jax.tree.leaves(tree), strict=True)
    }


def head_dims(problem):
    """Dimensions of a reference problem's head."""
    H = problem.teacher.embedding.shape[1]
    head = problem.head
    return HeadDims(
        hidden_size=H,
        intermediate_size=len(problem.params["midlayer.mlp.gate_proj.weight"]),
        num_heads=head.heads,
        num_kv_heads=head.kv_heads,
        head_dim=head.head_dim,
        draft_vocab_size=len(problem.d2t),
        target_vocab_size=len(problem.teacher.lm_head),
        norm_eps=head.eps,
        rope=Rope(theta=head.theta, rotary_dim=head.head_dim),
        fc_norm=head.fc_norm,
        norm_output=head.norm_output,
    )


@dataclasses.dataclass(frozen=True)
class GivenTarget:
    """A feature source whose hidden states stand in the batch; the teacher is made from them."""

    dims: DecoderDims
    vocab_block: int
    logit_softcap: float = 0.0

    @property
    def vocab_size(self):
        return self.dims.vocab_size

    def params_table(self):
        return decoder_params(self.dims, (), jnp.float32)

    def batch_fields(self):
        return {name: BatchField() for name in ("tokens", "aux", "final")}

    def outputs(self, params, batch, teacher_mask):
        argmax, logsumexp = decoder.teacher_argmax_and_logsumexp(
            params, self.dims, batch["final"], teacher_mask, self.vocab_block
        )
        return TargetOutputs(
            decoder.embed(params, batch["tokens"], jnp.float32),
            batch["aux"],
            TeacherOutputs(batch["final"], argmax, logsumexp),
        )

    def teacher_lm_head(self, params, token_ids):
        return decoder.teacher_lm_head(params, token_ids)

    def embed(self, params, token_ids):
        return decoder.embed(params, token_ids, jnp.float32)


@dataclasses.dataclass(frozen=True)
class GivenTotals(Eagle3):
    """EAGLE-3 whose loss is divided by totals that were counted elsewhere."""

    totals: tuple[float, ...]

    def loss_totals(self, in_vocab_loss_mask, config):
        return jnp.asarray(self.totals, jnp.float32)


@dataclasses.dataclass
class Outcome:
    """What the code under test says of a problem."""

    rows: losses.PositionResults  # [K, B, T]
    loss_mask: np.ndarray  # bool [K, B, T]
    in_vocab_loss_mask: np.ndarray  # bool [K, B, T]
    sums: dict[str, np.ndarray]
    metrics: dict
    total: float
    gradients: dict[str, np.ndarray] | None  # by checkpoint name


@functools.lru_cache
def _compiled(spec, gradients, every_position):
    def on_device(batch, outputs, params, teacher):
        inputs, supervision, masks = train_step.device_inputs(spec, batch, outputs, teacher)
        if every_position:
            everywhere = jnp.ones_like(masks[0])
            blocks = PositionBlocks.from_loss_mask(everywhere, spec.rollout.position_block)
            supervision = dataclasses.replace(supervision, blocks=blocks)
        if gradients:
            total, gradient, results = training_pass.loss_and_gradient(
                spec.drafter, params, inputs, supervision, spec.rollout
            )
        else:
            results = training_pass.evaluate_positions(
                spec.drafter, params, inputs, supervision, spec.rollout
            )
            total, gradient = (supervision.weights * results.loss).sum(), None
        return total, gradient, results, masks, metrics.sums(results, *masks)

    def outcome(params, frozen, batch):
        outputs = train_step.target_outputs(spec, frozen, batch)
        everything = train_step.on_every_device(spec, on_device, PartitionSpec())
        return everything(batch, outputs, params, train_step.replicated_teacher(spec, frozen))

    return jax.jit(outcome)


def run(
    problem,
    steps,
    alignment="serving",
    denominator="supervised",
    *,
    attention_block=5,
    vocab_block=7,
    row_block=11,
    loss="kl",
    decay=0.8,
    counts=None,
    gradients=True,
    every_position=False,
):
    """Rollout, supervision, total and gradients of a problem, in float32.

    counts: the denominators [K], where they are taken over more than this batch.
    gradients: False compiles faster. every_position: rolls out unsupervised positions too.
    """
    dims, batch = head_dims(problem), problem.batch
    target_dims = models.tiny_dims(dims.target_vocab_size)
    spec = train_step.StepSpec(
        drafter=Eagle3(dims) if counts is None else GivenTotals(dims, tuple(counts)),
        source=GivenTarget(target_dims, vocab_block),
        loss=LossConfig(steps, loss, alignment, denominator, decay),
        rollout=RolloutConfig(row_block, attention_block),
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)),
        rules=(("draft_batch", ("data",)),),
    )
    draft_ids = np.arange(len(problem.d2t)) + problem.d2t
    frozen = train_step.FrozenParams(
        source={
            "embed": jnp.asarray(problem.teacher.embedding, jnp.float32),
            "head": jnp.asarray(problem.teacher.lm_head.T, jnp.float32),
        },
        draft_to_target=jnp.asarray(draft_ids, jnp.int32),
    )
    integers = {
        "tokens": batch.tokens,
        "positions": batch.positions,
        "segment_ids": batch.segments,
        "turn_ids": batch.turns,
    }
    hidden_states = {"aux": batch.aux, "final": batch.final}
    arrays = {name: jnp.asarray(x, jnp.int32)[None] for name, x in integers.items()}
    arrays |= {name: jnp.asarray(x, jnp.float32)[None] for name, x in hidden_states.items()}
    table = spec.drafter.params_table()
    params = tree_of(table, problem.params.__getitem__)
    total, gradient, results, masks, sums = _compiled(spec, gradients, every_position)(
        params, frozen, arrays
    )
    shape = (steps, *batch.turns.shape)
    loss_mask, in_vocab_loss_mask = (np.asarray(mask).reshape(shape) for mask in masks)
    sums = {name: np.asarray(value) for name, value in sums.items()}
    return Outcome(
        rows=jax.tree.map(lambda x: np.asarray(x).reshape(shape), results),
        loss_mask=loss_mask,
        in_vocab_loss_mask=in_vocab_loss_mask,
        sums=sums,
        metrics=metrics.finish(sums, decay ** np.arange(steps)),
        total=float(total),
        gradients=named(table, gradient) if gradients else None,
    )


def worst_gradient(ours, theirs):
    """(name, relative error) of the parameter whose gradient is furthest off."""
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in ours}
    name = max(errors, key=errors.get)
    return name, errors[name]


def from_rows(rows):
    """Reference rows [K, B, T] as the code's RowResults [K, B * T]."""
    assert isinstance(rows, reference.Rows)
    return losses.PositionResults(
        loss=jnp.asarray(flat(rows.loss), jnp.float32),
        cross_entropy=jnp.asarray(flat(rows.loss), jnp.float32),
        correct=jnp.asarray(flat(rows.correct)),
        alpha=jnp.asarray(flat(rows.alpha), jnp.float32),
    )


def flat(x):
    """[K, B, T] -> [K, B * T]."""
    return x.reshape(len(x), -1)
