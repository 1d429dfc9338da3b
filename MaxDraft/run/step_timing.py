"""How long a training step takes on the devices that are there, and its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft.drafts import losses
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.pyconfig import ConfigError
from MaxDraft.run.synthetic_step import SyntheticStep
from MaxDraft.train_step import FrozenParams


class RunningStep:
    """A compiled step with weights on the devices."""

    def __init__(
        self, step: SyntheticStep, compiled: Callable, weights_of: RunningStep | None = None
    ):
        """weights_of: a running step whose target is shared where shapes and shardings agree."""
        self.step, self.compiled = step, compiled
        _, self.shapes, batch = step.abstract_arguments()
        if weights_of is not None and _agree(weights_of.shapes, self.shapes):
            self.frozen = weights_of.frozen
        else:
            self.frozen = _random_frozen(step, self.shapes)
        self.batch = {
            name: jax.device_put(x, batch[name].sharding) for name, x in step.batch.items()
        }
        self.state = step.programs.initialize(None)

    def run(self) -> float:
        """One step -> seconds."""
        start = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, metrics))
        seconds = time.perf_counter() - start
        if not metrics["finite"]:
            raise ConfigError(f"{self.step.name}: the step's numbers are not finite")
        return seconds

    def breakdown(self, repeats: int, computed_positions: int) -> dict[str, float]:
        """Median seconds of the step's parts.

        The target, the draft step, the loss and the optimizer are timed, each as a program of its
        own; `rollout` is the draft step minus the loss.

        computed_positions: of all devices; the loss alone is run for those of one device.
        """
        programs, params = self.step.programs, self.state.params
        outputs = programs.target(self.frozen, self.batch)
        loss, gradient, _ = programs.draft(params, self.frozen, self.batch, outputs)
        target = median_seconds(lambda: programs.target(self.frozen, self.batch), repeats)
        draft = median_seconds(
            lambda: programs.draft(params, self.frozen, self.batch, outputs), repeats
        )

        def update():
            self.state, metrics = programs.update(self.state, loss, gradient)
            return metrics

        optimizer = median_seconds(update, repeats)
        loss_alone = _loss_program(self.step, computed_positions // self.step.spec.mesh.size)
        loss_seconds = median_seconds(loss_alone, repeats)
        return {
            "target": target,
            "rollout": draft - loss_seconds,
            "loss": loss_seconds,
            "optimizer": optimizer,
        }


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Of a function of arrays, after one call that compiles it."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def matmul_peak(dtype: Any) -> float:
    """FLOP/s that one device reaches in products of large square matrices."""
    size, count = (1024, 4) if jax.devices()[0].platform == "cpu" else (8192, 16)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype) * size**-0.5

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, count, lambda _, y: jnp.matmul(y, x), x)

    return count * 2 * size**3 / min(median_seconds(lambda: products(x), 3) for _ in range(3))


def _random_frozen(step: SyntheticStep, shapes: FrozenParams) -> FrozenParams:
    """Random weights of the target; the first D tokens are the draft vocabulary."""
    shardings = jax.tree.map(lambda x: x.sharding, shapes.source)
    table = step.spec.source.params_table()
    draw = jax.jit(lambda: parameters.initialize(table, 0), out_shardings=shardings)
    ids = np.arange(len(shapes.draft_to_target), dtype=np.int32)
    return FrozenParams(draw(), jax.device_put(ids, shapes.draft_to_target.sharding))


def _agree(shapes: Tree, others: Tree) -> bool:
    return jax.tree.structure(shapes) == jax.tree.structure(others) and all(
        a == b for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(others), strict=True)
    )


def _loss_program(step: SyntheticStep, positions: int) -> Callable[[], Any]:
    """The loss alone and its gradients, for so many positions, a block at a time on one device."""
    config, spec = step.config, step.spec
    K, H = spec.num_steps, step.target.hidden_size
    D = spec.drafter.draft_vocab_size or step.target.vocab_size
    R = min(config.rollout_block_size, positions)
    dtype = jnp.dtype(config.dtype)

    def run(hidden, lm_head, teacher_states):
        teacher_lm_head = lm_head.astype(dtype)

        def block(_, carry):
            hidden, d_lm_head = carry

            def loss(hidden):
                logits = jnp.matmul(
                    teacher_states, teacher_lm_head, preferred_element_type=jnp.float32
                )
                # As if the other tokens of the vocabulary had some of the probability.
                logsumexp = jax.nn.logsumexp(logits, -1) + 1
                argmax = jnp.zeros(len(teacher_states), jnp.int32)
                teacher = losses.TeacherTargets.from_logits(logits, logsumexp, argmax)
                weights = jnp.full((K, R), 1.0 / R)
                total, _, new_d_lm_head = losses.fused_linear_cross_entropy(
                    hidden, lm_head, d_lm_head, teacher, weights, config.loss
                )
                return total, new_d_lm_head

            d_hidden, d_lm_head = jax.grad(loss, has_aux=True)(hidden)
            return hidden + 1e-3 * d_hidden, d_lm_head

        carry = hidden, jnp.zeros_like(lm_head)
        return jax.lax.fori_loop(0, positions // R, block, carry)

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (K, R, H), dtype)
    lm_head = jax.random.normal(keys[1], (H, D), jnp.float32) * H**-0.5
    teacher_states = jax.random.normal(keys[2], (R + K - 1, H), dtype)
    program = jax.jit(run)
    return lambda: program(hidden, lm_head, teacher_states)
