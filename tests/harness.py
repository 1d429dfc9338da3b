"""The bridge from a reference problem (reference.py) to the code under test."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import reference

from MaxDraft.drafts import alignment as alignments
from MaxDraft.drafts import losses, metrics
from MaxDraft.drafts.eagle3.head import HeadDims, head_params
from MaxDraft.drafts.eagle3.rollout import Tokens
from MaxDraft.drafts.losses import Teacher
from MaxDraft.drafts.training_pass import (
    Blocks,
    Judgement,
    PassDims,
    judge_rows,
    loss_and_gradient,
)
from MaxDraft.layers.params import flatten
from MaxDraft.layers.rope import Rope
from MaxDraft.targets import decoder


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
    )


@dataclasses.dataclass
class Outcome:
    """What the code under test says of a problem."""

    rows: losses.RowResults  # [K, B, T]
    aligned: np.ndarray  # bool [K, B, T]
    counted: np.ndarray  # bool [K, B, T]
    sums: dict[str, np.ndarray]
    metrics: dict
    total: float
    gradients: dict[str, np.ndarray] | None  # by checkpoint name


@functools.lru_cache
def _compiled(dims, how, vocab_block, decay, gradients, every_row):
    def outcome(params, target, batch, draft_ids, inside, aligned, denominators):
        positions = alignments.teacher_positions(aligned)
        teacher = Teacher(
            batch["final"],
            *decoder.full_vocabulary(
                target, models.tiny_dims(), batch["final"], positions, vocab_block
            ),
        )
        blocks = Blocks.of(aligned.reshape(len(aligned), -1) | every_row, how.row_block)
        counted = aligned & losses.teacher_in_vocabulary(teacher.best, inside, how.ttt_length)
        counts = counted.sum((1, 2)).astype(jnp.float32)
        denominators = jnp.where(denominators > 0, denominators, counts)
        weights = losses.row_weights(counted, denominators, decay)
        embeddings = decoder.embed(target, batch["tokens"], jnp.float32)
        tokens = Tokens.of(embeddings, batch["aux"], batch["positions"], batch["segments"])
        judgement = Judgement(
            teacher=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), teacher),
            teacher_head=decoder.draft_head_weight(target, draft_ids),
            target_to_draft=jnp.full(len(inside), -1).at[draft_ids].set(jnp.arange(len(draft_ids))),
            blocks=blocks,
            weights=weights.reshape(len(weights), -1),
        )
        if gradients:
            total, gradient, rows = loss_and_gradient(params, dims, tokens, judgement, how)
        else:
            rows = judge_rows(params, dims, tokens, judgement, how)
            total, gradient = (judgement.weights * rows.loss).sum(), None
        sums = metrics.sums(rows, *(x.reshape(len(x), -1) for x in (aligned, counted)))
        return (
            total,
            gradient,
            jax.tree.map(lambda x: x.reshape(aligned.shape), rows),
            aligned,
            counted,
            sums,
        )

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
    every_row=False,
):
    """Rollout, judgement, total and gradients of a problem, in float32.

    counts: the denominators [K], where they are taken over more than this batch.
    gradients: False compiles faster. every_row: rolls out those too that nobody judges.
    """
    dims, batch = head_dims(problem), problem.batch
    table = head_params(dims)
    params = tree_of(table, problem.params.__getitem__)
    target = {
        "embed": jnp.asarray(problem.teacher.embedding, jnp.float32),
        "head": jnp.asarray(problem.teacher.lm_head.T, jnp.float32),
    }
    draft_ids = np.arange(len(problem.d2t)) + problem.d2t
    inside = np.zeros(dims.target_vocab_size, bool)
    inside[draft_ids] = True
    turns, segments = jnp.asarray(batch.turns, jnp.int32), jnp.asarray(batch.segments, jnp.int32)
    aligned = alignments.aligned_rows(turns, segments, steps, alignment)
    arrays = {
        "tokens": jnp.asarray(batch.tokens, jnp.int32),
        "positions": jnp.asarray(batch.positions, jnp.int32),
        "segments": segments,
        "aux": jnp.asarray(batch.aux, jnp.float32),
        "final": jnp.asarray(batch.final, jnp.float32),
    }
    if counts is None:
        counts = np.zeros(steps) if denominator == "supervised" else np.full(steps, turns.size)
    how = PassDims(steps, loss, row_block, attention_block)
    compiled = _compiled(dims, how, vocab_block, decay, gradients, every_row)
    total, gradient, rows, aligned, counted, sums = compiled(
        params,
        target,
        arrays,
        jnp.asarray(draft_ids, jnp.int32),
        jnp.asarray(inside),
        aligned,
        jnp.asarray(counts, jnp.float32),
    )
    sums = {name: np.asarray(value) for name, value in sums.items()}
    return Outcome(
        rows=jax.tree.map(np.asarray, rows),
        aligned=np.asarray(aligned),
        counted=np.asarray(counted),
        sums=sums,
        metrics=metrics.finish(sums, decay),
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
    return losses.RowResults(
        loss=jnp.asarray(flat(rows.loss), jnp.float32),
        cross_entropy=jnp.asarray(flat(rows.loss), jnp.float32),
        correct=jnp.asarray(flat(rows.correct)),
        alpha=jnp.asarray(flat(rows.alpha), jnp.float32),
    )


def flat(x):
    """[K, B, T] -> [K, B * T]."""
    return x.reshape(len(x), -1)
