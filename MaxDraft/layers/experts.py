"""Mixture of experts, forward: every token passes through the k experts that its router chooses.

    y[n] = sum over j of weight[n, j] * expert[chosen[n, j]](x[n])  +  shared expert(x[n])

router.py chooses, expert_products.py multiplies. On a mesh (the rules of sharding.py) a device
holds some of the experts, and of these a part of the intermediate dimension. Tokens visit the
devices between which the matrices are split, in a ring: a device adds the outputs of its experts
for the tokens that are with it and passes both on, so that never more than one device's tokens,
copied for k experts, lie in its memory.

L tokens, k experts of a token, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from MaxDraft import sharding
from MaxDraft.layers.expert_products import Experts, chosen_experts, num_held
from MaxDraft.layers.mlp import gated_mlp, linear
from MaxDraft.layers.params import Quantized, Tree
from MaxDraft.layers.router import route


def mixture(x: jax.Array, w: Tree, dims: Experts) -> jax.Array:
    """x [..., H] -> [..., H] in x's dtype, summed over a token's experts in float32.

    w: router [H, E] (router_bias, score_bias [E]); gate, up [E, H, I], down [E, I, H], any of them
       Quantized (gate_bias, up_bias [E, I], down_bias [E, H]); shared as in gated_mlp
       (shared_gate [H, 1]).
    """
    active = sharding.active_rules()
    if active is None:
        tokens = x.reshape(-1, x.shape[-1])
        y = chosen_experts(tokens, *route(tokens, w, dims.router), w, dims)
        y = y.astype(x.dtype).reshape(x.shape)
    else:
        y = _on_mesh(x, w, dims, *active)
    if "shared" in w:
        shared = gated_mlp(x, w["shared"], dims.activation)
        if "shared_gate" in w:
            shared = jax.nn.sigmoid(linear(x, w["shared_gate"])) * shared
        y = y + shared
    return y


def _on_mesh(
    x: jax.Array, w: Tree, dims: Experts, mesh: Mesh, rules: dict[str, tuple[str, ...]]
) -> jax.Array:
    """The routed experts where `rules` split them and the tokens: [..., H] in x's dtype."""
    experts, inner = (rules.get(axis, ()) for axis in ("target_experts", "target_expert_mlp"))
    batch = rules.get("target_batch", ())
    # A token needs every device along these axes. Where tokens are split over an axis themselves,
    # they travel along it; the order of the mesh is the one that ppermute asks for.
    ring = tuple(axis for axis in mesh.axis_names if axis in batch and axis in experts + inner)
    still = tuple(axis for axis in experts + inner if axis not in ring)
    ring_size = math.prod(mesh.shape[axis] for axis in ring)
    parts = math.prod(mesh.shape[axis] for axis in inner)

    def on_device(x, w):
        tokens = x.reshape(-1, x.shape[-1])
        first = jax.lax.axis_index(experts) * num_held(w) if experts else 0
        if "down_bias" in w and inner:  # the sum over the devices of `inner` must have it once
            w = w | {"down_bias": w["down_bias"] * (jax.lax.axis_index(inner) == 0)}

        def visit(travelling, _):
            arrays, total = travelling
            total = total + chosen_experts(*arrays, w, dims, first)
            if ring:
                onward = [(i, (i + 1) % ring_size) for i in range(ring_size)]
                return jax.lax.ppermute((arrays, total), ring, onward), None
            return (arrays, total), None

        start = ((tokens, *route(tokens, w, dims.router)), jnp.zeros(tokens.shape, jnp.float32))
        (_, total), _ = jax.lax.scan(visit, start, length=ring_size)
        if still:
            total = jax.lax.psum(total, still)
        return total.astype(x.dtype).reshape(x.shape)

    def spec(*axes):
        return sharding.partition_spec(axes, rules)

    up = spec("target_experts", None, "target_expert_mlp")
    down = spec("target_experts", "target_expert_mlp", None)
    specs = {
        "gate": up,
        "up": up,
        "down": down,
        "gate_bias": spec("target_experts", "target_expert_mlp"),
        "up_bias": spec("target_experts", "target_expert_mlp"),
        "down_bias": spec("target_experts", None),
        "router": PartitionSpec(),
        "router_bias": PartitionSpec(),
        "score_bias": PartitionSpec(),
    }
    specs = {name: specs[name] for name in specs if name in w}
    w = {name: w[name] for name in specs}
    for name, cuts in (("gate", (1, parts)), ("up", (1, parts)), ("down", (parts, 1))):
        if isinstance(w[name], Quantized):
            w[name] = _cut_scales(w[name], *cuts)
    tokens = spec("target_batch", *(None,) * (x.ndim - 1))
    # check_vma would refuse the `cond` of in_blocks, whose branches differ in what varies.
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(tokens, specs), out_specs=tokens, check_vma=False
    )
    return run(x, w)


def _cut_scales(q: Quantized, inputs: int, outputs: int) -> Quantized:
    """q with its scales repeated, so that each of inputs x outputs parts has scales of its own.

    in_size becomes that of a part, which is what a device holds.
    """
    scale = q.scale
    for axis, size, parts in ((-2, q.in_size, inputs), (-1, q.values.shape[-1], outputs)):
        if parts > 1:
            block = size // scale.shape[axis]
            scale = jnp.repeat(scale, block // math.gcd(block, size // parts), axis)
    return dataclasses.replace(q, scale=scale, in_size=q.in_size // inputs)
