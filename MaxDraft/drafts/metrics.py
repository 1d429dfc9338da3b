"""Metrics of a draft head, as sums and counts until the last division.

loss_k        mean loss of step k over its counted rows, of the loss that is trained
kl, lk_hybrid, lk_alpha    what each of losses.LOSSES would be, whichever is trained
acc_k         share of aligned rows where the head's argmax is the target's argmax over ALL tokens
cond_acc_k    the same, among rows that were right at all steps before k (the papers' n-alpha)
alpha_k       mean over aligned rows of sum_v min(p(v), q(v)): expected acceptance when sampling
sim_accept_length   1 + a0 + a0 a1 + ... with a = cond_acc: tokens per verify step of a greedy
                    chain of K drafts, the bonus token included
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft.drafts.losses import LOSSES, RowResults, of_row

SUMS = (
    "loss_sum",
    *(f"{loss}_sum" for loss in LOSSES),
    "counted_rows",
    "aligned_rows",
    "correct_rows",
    "reached_rows",
    "reached_correct_rows",
    "alpha_sum",
)


def sums(rows: RowResults, aligned: jax.Array, counted: jax.Array) -> dict[str, jax.Array]:
    """Per-step sums and counts under the names SUMS, float32 [K]; masks bool [K, R]."""
    right = rows.correct & aligned
    right_before = jnp.concatenate(
        [jnp.ones_like(right[:1]), jnp.cumprod(right, axis=0)[:-1].astype(bool)]
    )

    def total(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32).sum(axis=1)

    return {
        "loss_sum": total(jnp.where(counted, rows.loss, 0.0)),
        **{
            f"{loss}_sum": total(
                jnp.where(counted, of_row(loss, rows.cross_entropy, rows.alpha)[0], 0.0)
            )
            for loss in LOSSES
        },
        "counted_rows": total(counted),
        "aligned_rows": total(aligned),
        "correct_rows": total(right),
        "reached_rows": total(aligned & right_before),
        "reached_correct_rows": total(right & right_before),
        "alpha_sum": total(jnp.where(aligned, rows.alpha, 0.0)),
    }


def finish(sums: Mapping[str, np.ndarray], decay: float) -> dict[str, list[float] | float]:
    """Pooled sums -> named metrics; a step without any row reads 0."""

    def ratio(numerator: str, denominator: str) -> np.ndarray:
        below = np.asarray(sums[denominator], np.float64)
        above = np.asarray(sums[numerator], np.float64)
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    def over_steps(loss: np.ndarray) -> float:
        return float((decay ** np.arange(len(loss)) * loss).sum())

    loss = ratio("loss_sum", "counted_rows")
    cond_acc = ratio("reached_correct_rows", "reached_rows")
    return {
        "loss": over_steps(loss),
        "loss_by_step": loss.tolist(),
        **{name: over_steps(ratio(f"{name}_sum", "counted_rows")) for name in LOSSES},
        "acc": ratio("correct_rows", "aligned_rows").tolist(),
        "cond_acc": cond_acc.tolist(),
        "alpha": ratio("alpha_sum", "aligned_rows").tolist(),
        "sim_accept_length": float(1.0 + np.cumprod(cond_acc).sum()),
    }
