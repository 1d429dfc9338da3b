"""The drafts' loss against the target's distribution: a fused linear cross-entropy.

    p = softmax of the target's logits restricted to the D draft tokens (renormalized)
    q = softmax of the drafter's logits z = hidden @ lm_head
    alpha = sum_v min(p_full(v), q(v)), p_full over all V tokens: the expected acceptance

    kl         - sum_v p_v log q_v                    (KL up to the entropy of p, which is constant)
    lk_hybrid  lambda kl + (1 - lambda) (1 - alpha),  lambda = exp(-eta stop_gradient(alpha))
    lk_alpha   - log alpha                            (Samarin et al. 2026, arXiv:2602.23881)

    total = sum of weight * loss over positions and steps

Position i of step k is supervised by the teacher at i+1+k, which supervises position i+k at step 0.
So the teacher's distribution is made once for a block of neighbouring positions, and serves all K
steps. Since each position's weight in the total is known beforehand, its gradient to the logits is
made in the same pass, and no logits are kept.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

LOSSES = ("kl", "lk_hybrid", "lk_alpha")
_ETA = 3.0  # of lk_hybrid, the paper's
_SMALLEST_ALPHA = 1e-20  # under the logarithm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherTargets:
    """The teachers of R positions at step 0 and of the K - 1 that follow, over D draft tokens."""

    p: jax.Array  # float32 [R + K - 1, D], renormalized
    in_vocab_mass: jax.Array  # float32 [R + K - 1]: probability of the D tokens together
    argmax: jax.Array  # int32 [R + K - 1]: draft id of the argmax over all V tokens, or -1

    @classmethod
    def from_logits(
        cls, logits: jax.Array, logsumexp: jax.Array, argmax: jax.Array
    ) -> TeacherTargets:
        """logits float32 [R + K - 1, D] of the draft tokens, logsumexp over all V logits."""
        of_draft_tokens = jax.nn.logsumexp(logits, -1)
        p = jnp.exp(logits - of_draft_tokens[:, None])
        return cls(p, jnp.exp(of_draft_tokens - logsumexp), argmax)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionResults:
    """Per step and position; float32 or bool [K, R]. Without a teacher the values mean nothing."""

    loss: jax.Array  # the one that is trained
    cross_entropy: jax.Array  # - sum_v p_v log q_v
    correct: jax.Array  # bool: the target's argmax over all V tokens has the greatest draft logit
    alpha: jax.Array  # sum_v min(p_full(v), q(v)), p over all V tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def fused_linear_cross_entropy(
    hidden: jax.Array,  # [K, R, H] what the LM head is multiplied with
    lm_head: jax.Array,  # [H, D]
    d_lm_head: jax.Array | None,  # float32 [H, D] so far; None: the LM head is not trained
    teacher: TeacherTargets,
    weights: jax.Array,  # float32 [K, R]: what each position's loss counts in the total
    loss: str,  # one of LOSSES
) -> tuple[jax.Array, PositionResults, jax.Array | None]:
    """-> (sum of weights * loss; the positions' results; d_lm_head).

    The sum is differentiable in `hidden` only. In a differentiated call the gradient to the LM head
    is added to d_lm_head directly, for a cotangent of 1, so that no second array of its size is
    made: the sum must not be scaled afterwards.
    """
    total, results, _, d_lm_head = _all_steps(
        hidden, lm_head, d_lm_head, teacher, weights, loss, gradient=False
    )
    return total, results, d_lm_head


def _forward(hidden, lm_head, d_lm_head, teacher, weights, loss):
    total, results, d_hidden, d_lm_head = _all_steps(
        hidden, lm_head, d_lm_head, teacher, weights, loss, gradient=True
    )
    return (total, results, d_lm_head), d_hidden


def _backward(_, d_hidden, cotangents):
    return cotangents[0].astype(d_hidden.dtype) * d_hidden, None, None, None, None


fused_linear_cross_entropy.defvjp(_forward, _backward)


def _all_steps(hidden, lm_head, d_lm_head, teacher, weights, loss, *, gradient: bool):
    """-> total, PositionResults, gradient to hidden or None, d_lm_head."""
    weight = lm_head.astype(hidden.dtype)
    steps, positions = hidden.shape[:2]

    def step(d_lm_head, inputs):
        k, state, step_weights = inputs
        p, in_vocab_mass, argmax = (
            jax.lax.dynamic_slice_in_dim(x, k, positions)
            for x in (teacher.p, teacher.in_vocab_mass, teacher.argmax)
        )
        z = jnp.matmul(state, weight, preferred_element_type=jnp.float32)
        greatest = z.max(-1)
        exponentials = jnp.exp(z - greatest[:, None])
        total = exponentials.sum(-1)
        q, log_sum = exponentials / total[:, None], greatest + jnp.log(total)
        z_of_argmax = jnp.take_along_axis(z, jnp.maximum(argmax, 0)[:, None], axis=1)[:, 0]
        p_full = p * in_vocab_mass[:, None]
        alpha = jnp.minimum(p_full, q).sum(-1)
        cross_entropy = log_sum - (p * z).sum(-1)
        value, by_cross_entropy, by_alpha = loss_of_position(loss, cross_entropy, alpha)
        correct = (argmax >= 0) & (z_of_argmax >= greatest)
        result = PositionResults(value, cross_entropy, correct, alpha)
        if not gradient:
            return d_lm_head, (result, None)
        d_z = (step_weights * by_cross_entropy)[:, None] * (q - p)
        if loss != "kl":  # d alpha / d z = q (1[q < p] - sum of q over those)
            lower = jnp.where(q < p_full, q, 0.0)
            d_alpha = lower - q * lower.sum(-1, keepdims=True)
            d_z += (step_weights * by_alpha)[:, None] * d_alpha
        # A position without weight may have no teacher, and then holds anything, NaN included.
        d_z = jnp.where(step_weights[:, None] > 0, d_z, 0.0).astype(hidden.dtype)
        d_state = jnp.matmul(d_z, weight.T)
        if d_lm_head is not None:
            d_lm_head += jnp.einsum("rh,rd->hd", state, d_z, preferred_element_type=jnp.float32)
        return d_lm_head, (result, d_state)

    inputs = (jnp.arange(steps), hidden, weights)
    d_lm_head, (results, d_hidden) = jax.lax.scan(step, d_lm_head, inputs)
    total = jnp.where(weights > 0, weights * results.loss, 0.0).sum()
    return total, results, d_hidden, d_lm_head


def loss_of_position(
    loss: str, cross_entropy: jax.Array, alpha: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> the loss of each position, and its derivatives by the cross-entropy and by alpha."""
    match loss:
        case "kl":
            return cross_entropy, jnp.ones_like(alpha), jnp.zeros_like(alpha)
        case "lk_hybrid":
            mix = jnp.exp(-_ETA * alpha)
            return mix * cross_entropy + (1 - mix) * (1 - alpha), mix, mix - 1
        case "lk_alpha":
            alpha = jnp.maximum(alpha, _SMALLEST_ALPHA)
            return -jnp.log(alpha), jnp.zeros_like(alpha), -1 / alpha
    raise ValueError(f"unknown loss {loss!r}")
