"""How a gradient becomes an update: clipping, AdamW or Muon, and a learning-rate schedule (optax).

Muon (Jordan 2024) orthogonalizes the momentum of a matrix. It is for the matrices between hidden
states; norms, and matrices with a vocabulary for one side, belong to AdamW. Updates are scaled as
in Moonlight (arXiv:2502.16982), so that both take the same learning rate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
import optax.contrib
from jax.sharding import NamedSharding

from MaxDraft.layers.params import Param, Tree
from MaxDraft.pyconfig import Config

# Root mean square of Muon's update, as AdamW's is in practice (arXiv:2502.16982, section 2.2).
MUON_UPDATE_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The keys of base.yml, which explains them, that say how a gradient becomes an update."""

    opt_type: str
    learning_rate: float
    lr_schedule_type: str
    learning_rate_final_fraction: float
    warmup_steps_fraction: float
    wsd_decay_steps_fraction: float
    gradient_clipping_threshold: float
    adam_b1: float
    adam_b2: float
    adam_eps: float
    adam_weight_decay: float
    muon_beta: float

    @classmethod
    def from_config(cls, config: Config) -> OptimizerConfig:
        """The keys of the same names."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(config, name) for name in names})


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Steps done -> the learning rate of the next step.

    It rises on a line to its peak in the first warmup_steps_fraction of the steps. The first step
    has 1 / (warm-up steps + 1) of the peak and not 0, which would waste it. Then "cosine" falls by
    half a cosine; "wsd" stays and falls on a line in the last wsd_decay_steps_fraction of the
    steps. Both end at learning_rate_final_fraction of the peak, at step `total_steps`.
    """
    peak = config.learning_rate
    final = peak * config.learning_rate_final_fraction
    warmup = round(config.warmup_steps_fraction * total_steps)
    first = peak / (warmup + 1)
    if config.lr_schedule_type == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=first,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(total_steps, warmup + 1),
            end_value=final,
        )
    # The decay begins no earlier than the warm-up ends, and takes a step at least.
    decay = min(round(config.wsd_decay_steps_fraction * total_steps), total_steps - warmup)
    decay = max(decay, 1)
    return optax.join_schedules(
        [
            optax.linear_schedule(first, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, final, decay),
        ],
        boundaries=[warmup, max(total_steps - decay, warmup)],
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, table: Tree
) -> optax.GradientTransformation:
    """AdamW, or Muon and AdamW, behind a clip of the gradient's global norm.

    table: the parameters' table (Param), which says what each of them is.
    """
    update = optax.adamw(
        schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.adam_weight_decay,
    )
    if config.opt_type == "muon":
        muon = optax.contrib.muon(
            schedule,
            beta=config.muon_beta,
            weight_decay=config.adam_weight_decay,
            consistent_rms=MUON_UPDATE_RMS,
            # Matrices are [..., in, out]; each one of a stack is orthogonalized by itself.
            muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
        )
        labels = jax.tree.map(lambda param: "muon" if takes_muon(param) else "adamw", table)
        update = optax.partition({"muon": muon, "adamw": update}, labels)
    if config.gradient_clipping_threshold == 0:
        return update
    return optax.chain(optax.clip_by_global_norm(config.gradient_clipping_threshold), update)


def takes_muon(param: Param) -> bool:
    """Whether a parameter is a (stack of) matrices with no vocabulary dimension."""
    is_matrix = len(param.shape) >= 2
    return is_matrix and not any(axis and axis.endswith("vocab") for axis in param.axes)


def optimizer_state_shardings(
    state: Any, param_shardings: Tree, scalar_sharding: NamedSharding
) -> Any:
    """Tree of shardings for an optimizer's state: a moment is sharded as its parameter is.

    state: the state, or its shapes. scalar_sharding: that of counters. The path of a moment in the
    state ends with the path of its parameter, by which it is recognized.
    """
    shardings = dict(jax.tree_util.tree_flatten_with_path(param_shardings)[0])

    def sharding_at(path, _):
        ends = (path[start:] for start in range(len(path)))
        return next((shardings[end] for end in ends if end in shardings), scalar_sharding)

    return jax.tree_util.tree_map_with_path(sharding_at, state)
