"""Metrics of a draft head, as sums and counts until the last division.

loss          sum over steps of step_weights[k] * loss_k
loss_k        mean of step k's loss over supervised positions whose teacher's argmax is in the
              draft vocabulary; of the loss that is trained
kl, lk_hybrid, lk_alpha    what each of losses.LOSSES would be, whichever is trained
acc_k         share of supervised positions where the head's argmax is the target's over ALL tokens
cond_acc_k    the same, among positions that were right at all steps before k (the papers' n-alpha)
alpha_k       mean over supervised positions of sum_v min(p(v), q(v)): expected acceptance when
              sampling
sim_accept_length   1 + a0 + a0 a1 + ... with a = cond_acc: tokens per verify step of a greedy
                    chain of K drafts, the bonus token included
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft.drafts.losses import LOSSES, PositionResults, loss_of_position

SUMS = (
    "loss_sum",
    *(f"{loss}_sum" for loss in LOSSES),
    "in_vocab_positions",
    "supervised_positions",
    "correct_positions",
    "reached_positions",
    "reached_correct_positions",
    "alpha_sum",
)


def sums(
    results: PositionResults, loss_mask: jax.Array, in_vocab_loss_mask: jax.Array
) -> dict[str, jax.Array]:
    """Per-step sums and counts under the names SUMS, float32 [K]; masks bool [K, L]."""
    right = results.correct & loss_mask
    right_before = jnp.concatenate(
        [jnp.ones_like(right[:1]), jnp.cumprod(right, axis=0)[:-1].astype(bool)]
    )

    values = {
        loss: loss_of_position(loss, results.cross_entropy, results.alpha)[0] for loss in LOSSES
    }

    def total(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32).sum(axis=1)

    return {
        "loss_sum": total(jnp.where(in_vocab_loss_mask, results.loss, 0.0)),
        **{
            f"{loss}_sum": total(jnp.where(in_vocab_loss_mask, value, 0.0))
            for loss, value in values.items()
        },
        "in_vocab_positions": total(in_vocab_loss_mask),
        "supervised_positions": total(loss_mask),
        "correct_positions": total(right),
        "reached_positions": total(loss_mask & right_before),
        "reached_correct_positions": total(right & right_before),
        "alpha_sum": total(jnp.where(loss_mask, results.alpha, 0.0)),
    }


def finish(
    sums: Mapping[str, np.ndarray], step_weights: np.ndarray
) -> dict[str, list[float] | float]:
    """Pooled sums -> named metrics; a step without any position reads 0.

    step_weights: float [K], what the mean loss of each step counts (Drafter.step_weights).
    """

    def ratio(numerator: str, denominator: str) -> np.ndarray:
        below = np.asarray(sums[denominator], np.float64)
        above = np.asarray(sums[numerator], np.float64)
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    def over_steps(loss: np.ndarray) -> float:
        return float((step_weights * loss).sum())

    loss = ratio("loss_sum", "in_vocab_positions")
    cond_acc = ratio("reached_correct_positions", "reached_positions")
    return {
        "loss": over_steps(loss),
        "loss_by_step": loss.tolist(),
        **{name: over_steps(ratio(f"{name}_sum", "in_vocab_positions")) for name in LOSSES},
        "acc": ratio("correct_positions", "supervised_positions").tolist(),
        "cond_acc": cond_acc.tolist(),
        "alpha": ratio("alpha_sum", "supervised_positions").tolist(),
        "sim_accept_length": float(1.0 + np.cumprod(cond_acc).sum()),
    }
