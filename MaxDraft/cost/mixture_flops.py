"""FLOPs of a mixture of experts, counted from its traced program.

A token that goes to k experts should cost k experts, 2 * 3 H I k FLOPs, and not the E experts that
a loop over all of them with masks would take. The router's product is with all experts by nature
and is therefore counted apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from MaxDraft.cost import traced_flops
from MaxDraft.layers.expert_products import Experts
from MaxDraft.layers.experts import mixture
from MaxDraft.layers.router import Router, route


def mixture_flops(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    num_tokens: int,
    platform: str,
) -> tuple[int, int]:
    """FLOPs of (experts, router) for the program of a platform, "tpu" or "cpu"."""
    H, I, E = hidden_size, intermediate_size, num_experts
    dims = Experts(E, I, Router(top_k))

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    w = {
        "router": array(H, E),
        "gate": array(E, H, I),
        "up": array(E, H, I),
        "down": array(E, I, H),
    }
    x = array(num_tokens, H)
    router = traced_flops.count(lambda x, w: route(x, w, dims.router), x, w, platform=platform)
    whole = traced_flops.count(lambda x, w: mixture(x, w, dims), x, w, platform=platform)
    return whole - router, router
