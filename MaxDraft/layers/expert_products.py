"""The products of a mixture of experts: tokens sorted by expert, each expert's rows at once.

The L * k pairs of a token and an expert are sorted by expert, so that an expert's rows lie
together and are multiplied with its matrices at once; no pair is dropped and no expert sees a token
that did not choose it. How the sorted rows are multiplied depends on the platform:
    TPU         jax.lax.ragged_dot, which XLA lowers to a grouped matmul over the rows that exist
    elsewhere   in blocks of rows of one expert each. XLA's other lowerings of ragged_dot multiply
                every row with every expert and mask the result: E times the work. That is so on
                GPUs too, where the grouped kernels stand behind experimental flags.

L tokens, k experts of a token, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from MaxDraft.layers import quantized
from MaxDraft.layers.mlp import ACTIVATIONS, linear
from MaxDraft.layers.params import Quantized, Tree
from MaxDraft.layers.router import Router

MATRICES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
_SMALL_BLOCK, _LARGE_BLOCK = 8, 256  # rows
_CLIP, _ALPHA = 7.0, 1.702  # gpt-oss: swiglu_limit and swiglu_alpha


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts, each a gated MLP, with an optional MLP that every token passes through.

    activation      silu, gelu_tanh or "clipped" (gpt-oss: SwiGLU with bounds)
    bias            the products of the experts have one
    apply_router_weight_on_input
                    the weight multiplies what goes into an expert, not what comes out (Llama 4)
    shared_intermediate_size
                    of the MLP that every token passes through (shared experts); 0: there is none
    shared_gate     its output is multiplied by the sigmoid of a product with x (Qwen2-MoE)
    """

    num_experts: int
    intermediate_size: int  # of one expert
    router: Router
    activation: str = "silu"
    bias: bool = False
    apply_router_weight_on_input: bool = False
    shared_intermediate_size: int = 0
    shared_gate: bool = False


def chosen_experts(
    x: jax.Array,  # [L, H]
    chosen: jax.Array,  # int [L, k]
    weights: jax.Array,  # float32 [L, k]
    w: Tree,
    dims: Experts,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Weighted sum [L, H] float32 over a token's experts, of those that w holds.

    w holds the experts `first`, first + 1, ...: on a mesh a device has a part of them.
    """
    matrices = {name: w[name] for name in MATRICES if name in w}

    def with_dims(form: Callable) -> Callable:
        return lambda *arrays: form(*arrays, dims)

    return jax.lax.platform_dependent(
        x,
        chosen - first,
        weights,
        matrices,
        tpu=with_dims(by_ragged_dot),
        default=with_dims(in_blocks),
    )


def by_ragged_dot(x, chosen, weights, w, dims: Experts) -> jax.Array:
    """chosen_experts with all sorted rows at once; experts that w does not hold have no rows."""
    sorted_pairs = sort_by_expert(chosen, num_held(w), 1)

    def product(rows, weight):
        return jax.lax.ragged_dot(
            rows, weight, sorted_pairs.counts, preferred_element_type=jnp.float32
        )  # [pairs, out]

    def multiply(rows, weight, bias):
        if isinstance(weight, Quantized):
            y = quantized.multiply(rows, weight, product)
        else:
            y = product(rows, weight.astype(rows.dtype)).astype(rows.dtype)
        return y if bias is None else y + bias.astype(rows.dtype)[sorted_pairs.expert]

    rows = _rows(x, weights, sorted_pairs.pair, dims)
    return _combine(
        _mlp(rows, w, dims.activation, multiply), sorted_pairs, chosen, weights, w, dims
    )


def in_blocks(x, chosen, weights, w, dims: Experts) -> jax.Array:
    """chosen_experts, one block of rows of one expert at a time; see by_ragged_dot."""
    size = block_rows(chosen.size, dims.num_experts)
    sorted_pairs = sort_by_expert(chosen, num_held(w), size)

    def block(which):
        expert, pair = which

        def result():
            own = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), w
            )
            return _mlp(_rows(x, weights, pair, dims), own, dims.activation, linear)

        # Blocks at the end are empty unless every expert's last block has a single row.
        return jax.lax.cond(
            expert < num_held(w), result, lambda: jnp.zeros((size, x.shape[-1]), x.dtype)
        )

    y = jax.lax.map(block, (sorted_pairs.expert[::size], sorted_pairs.pair.reshape(-1, size)))
    return _combine(y.reshape(-1, x.shape[-1]), sorted_pairs, chosen, weights, w, dims)


def block_rows(pairs: int, num_experts: int) -> int:
    """Rows of a block, a power of two.

    A quarter of an expert's mean share, so that the empty rows of its last block are at most a
    quarter of that share; but 8 rows if the share has as many, since every block reads the expert's
    matrices anew. In all, at most twice the pairs' rows are multiplied, and 1.25 times where shares
    are large.
    """
    share = pairs // num_experts
    rows = max(1, share // 4, min(share, _SMALL_BLOCK))
    return min(_LARGE_BLOCK, 1 << (rows.bit_length() - 1))


@dataclasses.dataclass(frozen=True)
class SortedPairs:
    """The pairs sorted by expert, each in a place; there are as many places as pairs or more.

    The places of an expert beyond its pairs repeat some pair, and their results are not read.
    """

    pair: jax.Array  # int [places]: token * k + j
    expert: jax.Array  # int [places]; E: no expert, up to the end
    of_pair: jax.Array  # int [pairs]: place, for pairs whose expert is one of the E
    counts: jax.Array  # int [E]: pairs of an expert


def sort_by_expert(chosen: jax.Array, E: int, size: int) -> SortedPairs:
    """Places where every expert starts at a multiple of `size`."""
    expert, num_pairs = chosen.reshape(-1), chosen.size
    expert = jnp.where((expert >= 0) & (expert < E), expert, E)
    order = jnp.argsort(expert)
    counts = (expert[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
    before = jnp.cumsum(counts) - counts  # in `order`
    padded_counts = -(-counts // size) * size
    ends = jnp.cumsum(padded_counts)
    starts = ends - padded_counts
    # At most so many blocks hold the pairs: every expert's last block has a single one then.
    places = jnp.arange((num_pairs + min(E, num_pairs) * (size - 1)) // size * size)
    owner = jnp.searchsorted(ends, places, side="right", method="compare_all")
    rank = places - starts.at[owner].get(mode="clip")
    source = before.at[owner].get(mode="clip") + rank
    rank_of_pair = jnp.argsort(order) - before.at[expert].get(mode="clip")
    return SortedPairs(
        pair=order.at[source].get(mode="clip"),
        expert=owner,
        of_pair=starts.at[expert].get(mode="clip") + rank_of_pair,
        counts=counts,
    )


def _rows(x: jax.Array, weights: jax.Array, pair: jax.Array, dims: Experts) -> jax.Array:
    """The inputs [places, H] of the experts of these pairs."""
    rows = x[pair // weights.shape[1]]
    if dims.apply_router_weight_on_input:
        rows = rows * weights.reshape(-1)[pair, None].astype(x.dtype)
    return rows


def _mlp(rows: jax.Array, w: Tree, activation: str, multiply: Callable) -> jax.Array:
    """gated_mlp whose products are multiply(rows, weight, bias), clipped where gpt-oss clips."""
    gate = multiply(rows, w["gate"], w.get("gate_bias"))
    up = multiply(rows, w["up"], w.get("up_bias"))
    if activation == "clipped":
        gate, up = jnp.minimum(gate, _CLIP), jnp.clip(up, -_CLIP, _CLIP)
        inner = gate * jax.nn.sigmoid(_ALPHA * gate) * (up + 1)
    else:
        inner = ACTIVATIONS[activation](gate) * up
    return multiply(inner, w["down"], w.get("down_bias"))


def _combine(y, sorted_pairs: SortedPairs, chosen, weights, w, dims: Experts) -> jax.Array:
    """The outputs y [places, H] of the places' experts, summed for every token: [L, H] float32."""
    y = y.at[sorted_pairs.of_pair].get(mode="clip").reshape(*chosen.shape, -1).astype(jnp.float32)
    if not dims.apply_router_weight_on_input:
        y = y * weights[:, :, None]
    held = (chosen >= 0) & (chosen < num_held(w))
    return jnp.where(held[:, :, None], y, 0).sum(1)


def num_held(w: Tree) -> int:
    """How many experts the matrices w have."""
    return jax.tree.leaves(w["gate"])[0].shape[0]
