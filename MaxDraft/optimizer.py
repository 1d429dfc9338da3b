"""How a gradient becomes an update: clip, AdamW or Muon, a schedule (optax); where moments lie."""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib
from jax.sharding import NamedSharding

from MaxDraft.layers.params import Tree
from MaxDraft.pyconfig import Config


def learning_rate_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Linear to the peak over warmup_steps_fraction of the steps, then to 0 as the config says."""
    warmup = round(config.warmup_steps_fraction * total_steps)
    first = config.learning_rate / (warmup + 1)  # not 0: the first step counts too
    if config.learning_rate_schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=first,
            peak_value=config.learning_rate,
            warmup_steps=warmup,
            decay_steps=max(total_steps, warmup + 1),
        )
    decay = min(round(config.decay_steps_fraction * total_steps), total_steps - warmup)
    decay = max(decay, 1)
    return optax.join_schedules(
        [
            optax.linear_schedule(first, config.learning_rate, warmup),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, decay),
        ],
        boundaries=[warmup, max(total_steps - decay, warmup)],
    )


def make_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """AdamW or Muon behind a clip of the global norm."""
    schedule = learning_rate_schedule(config, total_steps)
    update = optax.adamw(
        schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.adam_weight_decay,
    )
    if config.optimizer == "muon":  # scaled so that AdamW's learning rates serve (arXiv:2502.16982)
        muon = optax.contrib.muon(
            schedule,
            beta=config.muon_beta,
            weight_decay=config.adam_weight_decay,
            consistent_rms=0.2,
        )
        update = optax.partition({"muon": muon, "adamw": update}, _which_optimizer)
    if config.gradient_clipping_threshold == 0:
        return update
    return optax.chain(optax.clip_by_global_norm(config.gradient_clipping_threshold), update)


def _which_optimizer(params: Tree) -> Tree:
    """Muon for the layer's matrices and fc; AdamW for norms and, as is usual, the LM head."""
    chosen = jax.tree.map(lambda w: "muon" if w.ndim == 2 else "adamw", params)
    return chosen | {"lm_head": "adamw"}


def beside_their_parameters(state: Any, placement: Tree, otherwise: NamedSharding) -> Any:
    """Shardings of an optimizer's state: its moments lie where their parameters do.

    A moment is known by the end of its path, which is its parameter's.
    """
    places = dict(jax.tree_util.tree_flatten_with_path(placement)[0])

    def place(path, _):
        ends = (path[start:] for start in range(len(path)))
        return next((places[end] for end in ends if end in places), otherwise)

    return jax.tree_util.tree_map_with_path(place, state)
