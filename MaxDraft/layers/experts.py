"""Mixture of experts, forward: every token through the k experts that its router chooses.

    y[n] = sum over j of weight[n, j] * expert[chosen[n, j]](x[n])  +  shared expert(x[n])

The N * k pairs of a token and an expert are sorted by expert, so that an expert's rows lie together
and are multiplied with its matrices at once; no pair is dropped and no expert sees another token.
How the sorted rows are multiplied depends on the platform:
    TPU         jax.lax.ragged_dot, which XLA lowers to a grouped matmul over the rows there are
    elsewhere   in blocks of rows of one expert each. XLA's other lowerings of ragged_dot multiply
                every row with every expert and mask: E times the work. That is so on GPU too, where
                the grouped kernels stand behind experimental flags.

On a mesh (the rules of sharding.py) a device holds some of the experts, and of these a part of the
intermediate dimension. Tokens visit the devices between which the matrices are split, in a ring: a
device adds what its experts say to the tokens that are with it and passes both on, so that never
more than one device's tokens, sent to k experts, lie in its memory.

N tokens, k experts of a token, P = N * k pairs, E experts, H hidden size, I intermediate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from MaxDraft import sharding
from MaxDraft.layers import quantized
from MaxDraft.layers.mlp import ACTIVATIONS, gated_mlp, linear
from MaxDraft.layers.params import Quantized, Tree

MATRICES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
_SMALL_BLOCK, _LARGE_BLOCK = 8, 256  # rows
_CLIP, _ALPHA = 7.0, 1.702  # of gpt-oss


@dataclasses.dataclass(frozen=True)
class Router:
    """How a token chooses `top_k` of the experts, and their weights (layers/experts.py)."""

    top_k: int
    scores: str = "softmax"  # softmax or sigmoid of the router's logits; softmax_top: of the chosen
    bias: bool = False  # of the router's product
    selection_bias: bool = False  # added to the scores for choosing only, never to the weights
    normalize: bool = False  # weights are divided by their sum
    normalize_eps: float = 0.0  # added to that sum
    factor: float = 1.0  # weights are multiplied by it
    groups: int = 1  # experts are chosen from the best `top_groups` of so many groups
    top_groups: int = 1
    group_score: str = "max"  # of a group: its best expert's, or "top2": the sum of its best two


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts, each a gated MLP; optionally one that every token takes."""

    num_experts: int
    intermediate_size: int  # of one expert
    router: Router
    activation: str = "silu"  # silu, gelu_tanh or clipped (gpt-oss: swiglu with bounds)
    bias: bool = False  # of the experts' products
    weigh_input: bool = False  # the weight multiplies an expert's input, not its output (Llama 4)
    shared_size: int = 0  # intermediate size of the expert that every token takes; 0: none
    shared_gate: bool = False  # its output is multiplied by the sigmoid of a product with x


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


def route(x: jax.Array, w: Tree, router: Router) -> tuple[jax.Array, jax.Array]:
    """x [N, H] -> chosen experts int32 [N, k], their weights float32 [N, k]; ties: as top_k.

    Logits and scores are float32 whatever x is. DeepSeek, GLM and MiniMax say so; Mixtral, Qwen,
    gpt-oss and Llama 4 multiply in x's dtype, which in bfloat16 only chooses less exactly.
    """
    logits = jnp.matmul(
        x.astype(jnp.float32), w["router"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if "router_bias" in w:
        logits = logits + w["router_bias"].astype(jnp.float32)
    scores, choice = logits, logits
    if router.scores == "softmax":
        scores = choice = jax.nn.softmax(logits)
    elif router.scores == "sigmoid":
        # Choosing stays with the logits where nothing is added: of large ones every sigmoid is 1.
        scores = jax.nn.sigmoid(logits)
    if "score_bias" in w:
        choice = scores + w["score_bias"]
    if router.groups > 1:
        choice = _in_best_groups(choice, router)
    chosen = jax.lax.top_k(choice, router.top_k)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if router.scores == "softmax_top":
        weights = jax.nn.softmax(weights)
    if router.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + router.normalize_eps)
    return chosen, weights * router.factor


def _in_best_groups(choice: jax.Array, router: Router) -> jax.Array:
    """Scores [N, E], -inf outside a token's best groups (DeepSeek-V2, section 2.2.2; V3, 2.1.2).

    DeepSeek-V2's code has 0 in place of -inf, which to scores of a softmax is the same.
    """
    groups = choice.reshape(len(choice), router.groups, -1)  # [N, groups, E / groups]
    best = jax.lax.top_k(groups, 1 if router.group_score == "max" else 2)[0].sum(-1)
    kept = jax.lax.top_k(best, router.top_groups)[1]  # [N, top_groups]
    inside = (kept[:, :, None] == jnp.arange(router.groups)).any(1)  # [N, groups]
    return jnp.where(inside[:, :, None], groups, -jnp.inf).reshape(choice.shape)


def chosen_experts(
    x: jax.Array,  # [N, H]
    chosen: jax.Array,  # int [N, k]
    weights: jax.Array,  # float32 [N, k]
    w: Tree,
    dims: Experts,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Weighted sum [N, H] float32 over those of a token's experts that w has, from `first` on."""
    matrices = {name: w[name] for name in MATRICES if name in w}

    def form(multiply):
        return lambda *arrays: multiply(*arrays, dims)

    return jax.lax.platform_dependent(
        x, chosen - first, weights, matrices, tpu=form(by_ragged_dot), default=form(in_blocks)
    )


def by_ragged_dot(x, chosen, weights, w, dims: Experts) -> jax.Array:
    """chosen_experts, all sorted rows at once; an expert outside [0, experts of w) has none."""
    slots = _sort(chosen, _count(w), 1)

    def product(rows, weight):
        return jax.lax.ragged_dot(
            rows, weight, slots.counts, preferred_element_type=jnp.float32
        )  # [P, out]

    def multiply(rows, weight, bias):
        if isinstance(weight, Quantized):
            y = quantized.multiply(rows, weight, product)
        else:
            y = product(rows, weight.astype(rows.dtype)).astype(rows.dtype)
        return y if bias is None else y + bias.astype(rows.dtype)[slots.expert]

    rows = _rows(x, weights, slots.pair, dims)
    return _combine(_mlp(rows, w, dims.activation, multiply), slots, chosen, weights, w, dims)


def in_blocks(x, chosen, weights, w, dims: Experts) -> jax.Array:
    """chosen_experts, one block of rows of one expert at a time; see by_ragged_dot."""
    size = block_rows(chosen.size, dims.num_experts)
    slots = _sort(chosen, _count(w), size)

    def block(which):
        expert, pair = which

        def result():
            own = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), w
            )
            return _mlp(_rows(x, weights, pair, dims), own, dims.activation, linear)

        # Blocks at the end are empty unless the experts' rows fit their blocks worst.
        return jax.lax.cond(
            expert < _count(w), result, lambda: jnp.zeros((size, x.shape[-1]), x.dtype)
        )

    y = jax.lax.map(block, (slots.expert[::size], slots.pair.reshape(-1, size)))
    return _combine(y.reshape(-1, x.shape[-1]), slots, chosen, weights, w, dims)


def block_rows(pairs: int, num_experts: int) -> int:
    """Rows of a block, a power of two.

    A quarter of an expert's mean share, so that its last block idles by at most a quarter of it;
    but 8 rows if it has as many, since every block reads the expert's matrices anew. In all, no
    more than twice the pairs' rows are multiplied, and 1.25 times where shares are large.
    """
    share = pairs // num_experts
    rows = max(1, share // 4, min(share, _SMALL_BLOCK))
    return min(_LARGE_BLOCK, 1 << (rows.bit_length() - 1))


@dataclasses.dataclass(frozen=True)
class _Slots:
    """The pairs' places when sorted by expert, S >= P of them.

    Slots of an expert beyond its pairs repeat some pair; nobody reads what is computed there.
    """

    pair: jax.Array  # int [S]: token * k + j
    expert: jax.Array  # int [S]; E: none, from there to the end
    of_pair: jax.Array  # int [P]: slot, for pairs whose expert is one of the E
    counts: jax.Array  # int [E]: pairs of an expert


def _sort(chosen: jax.Array, E: int, size: int) -> _Slots:
    """Slots where every expert starts at a multiple of `size`."""
    expert, P = chosen.reshape(-1), chosen.size
    expert = jnp.where((expert >= 0) & (expert < E), expert, E)
    order = jnp.argsort(expert)
    counts = (expert[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
    before = jnp.cumsum(counts) - counts  # in `order`
    room = -(-counts // size) * size
    ends = jnp.cumsum(room)
    starts = ends - room
    # The most that P pairs need: every expert's last block holds a single one.
    slots = jnp.arange((P + min(E, P) * (size - 1)) // size * size)
    owner = jnp.searchsorted(ends, slots, side="right", method="compare_all")
    rank = slots - starts.at[owner].get(mode="clip")
    source = before.at[owner].get(mode="clip") + rank
    place = jnp.argsort(order) - before.at[expert].get(mode="clip")
    return _Slots(
        pair=order.at[source].get(mode="clip"),
        expert=owner,
        of_pair=starts.at[expert].get(mode="clip") + place,
        counts=counts,
    )


def _rows(x: jax.Array, weights: jax.Array, pair: jax.Array, dims: Experts) -> jax.Array:
    """What the experts of these pairs are given [S, H]."""
    rows = x[pair // weights.shape[1]]
    if dims.weigh_input:
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


def _combine(y, slots: _Slots, chosen, weights, w, dims: Experts) -> jax.Array:
    """What the slots' experts said, y [S, H], to every token [N, H] float32."""
    y = y.at[slots.of_pair].get(mode="clip").reshape(*chosen.shape, -1).astype(jnp.float32)
    if not dims.weigh_input:
        y = y * weights[:, :, None]
    here = (chosen >= 0) & (chosen < _count(w))
    return jnp.where(here[:, :, None], y, 0).sum(1)


def _count(w: Tree) -> int:
    return jax.tree.leaves(w["gate"])[0].shape[0]


def _on_mesh(
    x: jax.Array, w: Tree, dims: Experts, mesh: Mesh, rules: dict[str, tuple[str, ...]]
) -> jax.Array:
    """The routed experts where `rules` split them and the tokens: [..., H] in x's dtype."""
    experts, inner = (rules.get(axis, ()) for axis in ("target_experts", "target_expert_mlp"))
    batch = rules.get("target_batch", ())
    # A token needs every device along these axes: it travels where it is split over them itself.
    # In the mesh's order, which ppermute wants; any would do.
    ring = tuple(axis for axis in mesh.axis_names if axis in batch and axis in experts + inner)
    still = tuple(axis for axis in experts + inner if axis not in ring)
    ways = math.prod(mesh.shape[axis] for axis in ring)
    parts = math.prod(mesh.shape[axis] for axis in inner)

    def on_device(x, w):
        tokens = x.reshape(-1, x.shape[-1])
        first = jax.lax.axis_index(experts) * _count(w) if experts else 0
        if "down_bias" in w and inner:  # the sum over `inner` must have it once
            w = w | {"down_bias": w["down_bias"] * (jax.lax.axis_index(inner) == 0)}

        def visit(travelling, _):
            arrays, total = travelling
            total = total + chosen_experts(*arrays, w, dims, first)
            if ring:
                onward = [(i, (i + 1) % ways) for i in range(ways)]
                return jax.lax.ppermute((arrays, total), ring, onward), None
            return (arrays, total), None

        start = ((tokens, *route(tokens, w, dims.router)), jnp.zeros(tokens.shape, jnp.float32))
        (_, total), _ = jax.lax.scan(visit, start, length=ways)
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
    # Whether a value differs between devices is not checked: `cond` in in_blocks would not pass.
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(tokens, specs), out_specs=tokens, check_vma=False
    )
    return run(x, w)


def _cut_scales(q: Quantized, inputs: int, outputs: int) -> Quantized:
    """q with scales repeated until every of inputs x outputs parts has scales of its own.

    in_size becomes a part's: the devices that see it have one.
    """
    scale = q.scale
    for axis, size, parts in ((-2, q.in_size, inputs), (-1, q.values.shape[-1], outputs)):
        if parts > 1:
            block = size // scale.shape[axis]
            scale = jnp.repeat(scale, block // math.gcd(block, size // parts), axis)
    return dataclasses.replace(q, scale=scale, in_size=q.in_size // inputs)
