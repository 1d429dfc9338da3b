"""The rollout's loss against the target's distribution, over the draft vocabulary.

    p = softmax of the target's logits restricted to the D draft tokens (renormalised)
    q = softmax of the head's logits z
    alpha = sum_v min(p_full(v), q(v)), p_full over all V tokens: the expected acceptance

    kl         - sum_v p_v log q_v                    (KL up to the entropy of p, which is constant)
    lk_hybrid  lambda kl + (1 - lambda) (1 - alpha),  lambda = exp(-eta stop_gradient(alpha))
    lk_alpha   - log alpha                            (Samarin et al. 2026, arXiv:2602.23881)

    total = sum_k decay^k * (sum of loss_k over its counted rows) / (their number)

Row i of step k is judged by the teacher at position i+1+k, which is the teacher of row i+k at step
0: of the k-th row after it. The teacher's distribution is made once for a block of rows, and all K
states of the block are judged by it. Since each row's weight in the total is known beforehand, its
gradient to the logits is made in the same pass, and no logits are kept.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from MaxDraft.drafts.eagle3.rollout import shift_left

LOSSES = ("kl", "lk_hybrid", "lk_alpha")
_ETA = 3.0  # of lk_hybrid, the paper's
_LEAST = 1e-20  # alpha under the logarithm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """What the target says at every position."""

    last: jax.Array  # [..., H] final normed state
    best: jax.Array  # int32 [...] argmax over all V tokens
    log_norm: jax.Array  # float32 [...] log sum exp of all V logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judge:
    """Teachers of R rows at step 0 and of the K - 1 rows behind them, over the D draft tokens."""

    p: jax.Array  # float32 [R + K - 1, D], renormalised
    inside: jax.Array  # float32 [R + K - 1], the share of all probability that the D tokens have
    best: jax.Array  # int32 [R + K - 1], place among them of the argmax over all V tokens, or -1

    @classmethod
    def of(cls, logits: jax.Array, log_norm: jax.Array, best: jax.Array) -> Judge:
        """logits float32 [R + K - 1, D] of the draft tokens, log_norm over all V."""
        log_sum = jax.nn.logsumexp(logits, -1)
        return cls(jnp.exp(logits - log_sum[:, None]), jnp.exp(log_sum - log_norm), best)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowResults:
    """Per step and row; float32 or bool [K, R]. Rows without a teacher hold garbage."""

    loss: jax.Array  # the one that is trained
    cross_entropy: jax.Array  # - sum_v p_v log q_v
    correct: jax.Array  # bool: the target's full-vocabulary argmax has the head's greatest logit
    alpha: jax.Array  # sum_v min(p_full(v), q(v)), p over all V tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def judged(
    hidden: jax.Array,  # [K, R, H] what the LM head is multiplied with
    lm_head: jax.Array,  # float32 [H, D]
    d_head: jax.Array | None,  # float32 [H, D]; None where nothing is differentiated
    judge: Judge,
    weights: jax.Array,  # float32 [K, R]: what each row's loss counts in the total
    loss: str,
) -> tuple[jax.Array, RowResults, jax.Array | None]:
    """-> (sum of weights * loss; each row's results; d_head).

    The sum has its gradient to hidden. Where that is asked for, d_head comes back with the sum's
    gradient to lm_head added, which autodiff is not told of: no array of its size is made.
    """
    total, rows, _, d_head = _all_steps(
        hidden, lm_head, d_head, judge, weights, loss, gradient=False
    )
    return total, rows, d_head


def _judged_forward(hidden, lm_head, d_head, judge, weights, loss):
    total, rows, d_hidden, d_head = _all_steps(
        hidden, lm_head, d_head, judge, weights, loss, gradient=True
    )
    return (total, rows, d_head), d_hidden


def _judged_backward(_, d_hidden, cotangents):
    return cotangents[0].astype(d_hidden.dtype) * d_hidden, None, None, None, None


judged.defvjp(_judged_forward, _judged_backward)


def _all_steps(hidden, lm_head, d_head, judge, weights, loss, *, gradient: bool):
    """-> total, RowResults, gradient to hidden or None, d_head."""
    weight = lm_head.astype(hidden.dtype)
    steps, rows = hidden.shape[:2]

    def step(d_head, given):
        k, state, row_weights = given
        p, inside, best = (
            jax.lax.dynamic_slice_in_dim(x, k, rows) for x in (judge.p, judge.inside, judge.best)
        )
        z = jnp.matmul(state, weight, preferred_element_type=jnp.float32)
        most = z.max(-1)
        exponentials = jnp.exp(z - most[:, None])
        total = exponentials.sum(-1)
        q, log_sum = exponentials / total[:, None], most + jnp.log(total)
        of_best = jnp.take_along_axis(z, jnp.maximum(best, 0)[:, None], axis=1)[:, 0]
        p_full = p * inside[:, None]
        alpha = jnp.minimum(p_full, q).sum(-1)
        cross_entropy = log_sum - (p * z).sum(-1)
        value, towards_p, towards_alpha = of_row(loss, cross_entropy, alpha)
        result = RowResults(value, cross_entropy, (best >= 0) & (of_best >= most), alpha)
        if not gradient:
            return d_head, (result, None)
        d_z = (row_weights * towards_p)[:, None] * (q - p)
        if loss != "kl":  # d alpha / d z = q (1[q < p] - sum of q over those)
            lower = jnp.where(q < p_full, q, 0.0)
            d_alpha = lower - q * lower.sum(-1, keepdims=True)
            d_z += (row_weights * towards_alpha)[:, None] * d_alpha
        # Whatever a row without weight holds, its teacher may not be one at all.
        d_z = jnp.where(row_weights[:, None] > 0, d_z, 0.0).astype(hidden.dtype)
        d_state = jnp.matmul(d_z, weight.T)
        d_head += jnp.einsum("rh,rd->hd", state, d_z, preferred_element_type=jnp.float32)
        return d_head, (result, d_state)

    given = (jnp.arange(steps), hidden, weights)
    d_head, (results, d_hidden) = jax.lax.scan(step, d_head, given)
    total = jnp.where(weights > 0, weights * results.loss, 0.0).sum()
    return total, results, d_hidden, d_head


def of_row(
    loss: str, cross_entropy: jax.Array, alpha: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> the loss of each row, and its derivatives by the cross-entropy and by alpha."""
    match loss:
        case "kl":
            return cross_entropy, jnp.ones_like(alpha), jnp.zeros_like(alpha)
        case "lk_hybrid":
            mix = jnp.exp(-_ETA * alpha)
            return mix * cross_entropy + (1 - mix) * (1 - alpha), mix, mix - 1
        case "lk_alpha":
            alpha = jnp.maximum(alpha, _LEAST)
            return -jnp.log(alpha), jnp.zeros_like(alpha), -1 / alpha
    raise ValueError(f"unknown loss {loss!r}")


def teacher_in_vocabulary(
    teacher_best: jax.Array,  # int [B, T]
    target_to_draft: jax.Array,  # bool [V]: true inside the draft vocabulary (t2d)
    ttt_length: int,
) -> jax.Array:  # bool [K, B, T]
    """Rows whose teacher's argmax the head could draft at all."""
    inside = target_to_draft[teacher_best]
    return jnp.stack([shift_left(inside, 1 + k) for k in range(ttt_length)])


def row_weights(counted: jax.Array, denominators: jax.Array, decay: float) -> jax.Array:
    """decay^k / denominator_k where a row counts, float32 like counted bool [K, ...]."""
    weights = decay ** jnp.arange(len(counted), dtype=jnp.float32) / jnp.maximum(denominators, 1.0)
    return jnp.where(counted, weights.reshape(-1, *[1] * (counted.ndim - 1)), 0.0)
