"""Mixtures of experts against a loop over tokens in float64, and against transformers."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from MaxDraft.cost.mixture_flops import mixture_flops
from MaxDraft.layers.expert_products import (
    MATRICES,
    Experts,
    block_rows,
    by_ragged_dot,
    in_blocks,
    sort_by_expert,
)
from MaxDraft.layers.experts import mixture
from MaxDraft.layers.params import Quantized
from MaxDraft.layers.quantized import dequantize
from MaxDraft.layers.router import Router, route
from MaxDraft.sharding import active_rules, axis_rules

H, I, E = 16, 24, 8
WIDE, WIDE_INNER = 2048, 768  # sizes of a published mixture, traced and not run
ROUTERS = {
    "softmax": Router(3),
    "softmax, normalized": Router(3, norm_topk_prob=True, routed_scaling_factor=2.5),
    "softmax in groups": Router(3, n_group=4, topk_group=2, routed_scaling_factor=16.0),
    "softmax of the chosen": Router(3, "softmax_top", bias=True),
    "sigmoid": Router(1, "sigmoid"),
    "sigmoid, biased choice": Router(
        4,
        "sigmoid",
        selection_bias=True,
        norm_topk_prob=True,
        norm_eps=1e-20,
        routed_scaling_factor=1.8,
    ),
    "sigmoid, biased choice in groups": Router(
        3,
        "sigmoid",
        selection_bias=True,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
        group_score="top2",
    ),
}
MIXTURES = {
    "silu": Experts(E, I, Router(3)),
    "gelu": Experts(E, I, Router(2, norm_topk_prob=True), activation="gelu_tanh"),
    "clipped, with biases": Experts(
        E, I, ROUTERS["softmax of the chosen"], activation="clipped", bias=True
    ),
    "weighed input, shared": Experts(
        E, I, ROUTERS["sigmoid"], apply_router_weight_on_input=True, shared_intermediate_size=20
    ),
    "gated shared": Experts(E, I, Router(4), shared_intermediate_size=12, shared_gate=True),
}
FORMS = {"blocks": in_blocks, "ragged dot": by_ragged_dot}
AXES = ("data", "fsdp", "expert", "tensor")
RULES = [
    ["target_batch", ["data", "fsdp", "expert"]],
    ["target_embed", ["fsdp", "expert"]],
    ["target_mlp", ["tensor"]],
    ["target_experts", ["expert"]],
    ["target_expert_embed", ["fsdp"]],
    ["target_expert_mlp", ["tensor"]],
]
WHOLE_BATCHES = [rule for rule in RULES if not rule[0].endswith("_batch")]

needs_eight = pytest.mark.skipif(len(jax.devices()) != 8, reason="needs eight devices")


def normal(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def weights_of(dims, seed=0):
    rng = np.random.default_rng(seed)
    E, I, S = dims.num_experts, dims.intermediate_size, dims.shared_intermediate_size

    def matrix(*shape, scale=1.0):
        return normal(rng, *shape, scale=scale * shape[-2] ** -0.5)

    # Wide enough apart that products are clipped, if they are to be.
    scale = 6.0 if dims.activation == "clipped" else 1.0
    w = {
        "router": matrix(H, E, scale=2.0),
        "gate": matrix(E, H, I, scale=scale),
        "up": matrix(E, H, I, scale=scale),
        "down": matrix(E, I, H),
    }
    if dims.bias:
        w |= {"gate_bias": normal(rng, E, I), "up_bias": normal(rng, E, I)}
        w["down_bias"] = normal(rng, E, H)
    if dims.router.bias:
        w["router_bias"] = normal(rng, E)
    if dims.router.selection_bias:
        w["score_bias"] = normal(rng, E, scale=0.3)
    if S:
        w["shared"] = {"gate": matrix(H, S), "up": matrix(H, S), "down": matrix(S, H)}
    if dims.shared_gate:
        w["shared_gate"] = matrix(H, 1)
    return w


def inputs(*shape, seed=1):
    return normal(np.random.default_rng(seed), *shape, H)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# ------------------------------------------------------------------- a loop over tokens and experts
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


ACTIVATIONS = {
    "silu": lambda g, u: g * sigmoid(g) * u,
    "gelu_tanh": lambda g, u: (
        0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u
    ),
    "clipped": lambda g, u: (
        np.minimum(g, 7) * sigmoid(1.702 * np.minimum(g, 7)) * (np.clip(u, -7, 7) + 1)
    ),
}


def best(scores, count):
    """Indices of the largest, the first of equals first."""
    return np.argsort(-scores, kind="stable")[:count]


def plain_route(x, w, router):
    """One token: {expert: weight}."""
    logits = x @ w["router"] + w.get("router_bias", 0)
    scores = {"softmax": softmax, "sigmoid": sigmoid, "softmax_top": lambda x: x}[router.scores](
        logits
    )
    choice = scores + w.get("score_bias", 0)
    size = len(choice) // router.n_group
    groups = choice.reshape(router.n_group, size)
    of_group = [np.sort(g)[-(1 if router.group_score == "max" else 2) :].sum() for g in groups]
    allowed = {
        g * size + i for g in best(np.array(of_group), router.topk_group) for i in range(size)
    }
    choice = np.array([c if e in allowed else -np.inf for e, c in enumerate(choice)])
    chosen = best(choice, router.top_k)
    weights = scores[chosen]
    if router.scores == "softmax_top":
        weights = softmax(weights)
    if router.norm_topk_prob:
        weights = weights / (weights.sum() + router.norm_eps)
    return dict(zip(chosen, weights * router.routed_scaling_factor, strict=True))


def plain_expert(x, w, e, activation):
    gate, up, down = (
        lambda x, name=name: (
            x @ w[name][e] + (w[name + "_bias"][e] if name + "_bias" in w else 0)
        )
        for name in ("gate", "up", "down")
    )  # fmt: skip
    return down(ACTIVATIONS[activation](gate(x), up(x)))


def plain_chosen(x, chosen, weights, w, dims):
    y = np.zeros(x.shape)
    for n, e, weight in zip(
        np.arange(chosen.size) // chosen.shape[1], chosen.flat, weights.flat, strict=True
    ):
        if 0 <= e < len(w["gate"]):
            if dims.apply_router_weight_on_input:
                y[n] += plain_expert(weight * x[n], w, e, dims.activation)
            else:
                y[n] += weight * plain_expert(x[n], w, e, dims.activation)
    return y


def plain_mixture(x, w, dims):
    y = []
    for token in x:
        found = plain_route(token, w, dims.router)
        chosen, weights = np.array([list(found)]), np.array([list(found.values())])
        out = plain_chosen(token[None], chosen, weights, w, dims)[0]
        if "shared" in w:
            one = {name: m[None] for name, m in w["shared"].items()}
            gate = sigmoid(token @ w["shared_gate"]) if "shared_gate" in w else 1
            out = out + gate * plain_expert(token, one, 0, dims.activation)
        y.append(out)
    return np.array(y)


# ------------------------------------------------------------------------------------------- router
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_chooses_and_weighs_as_its_formula(name):
    router = ROUTERS[name]
    w = weights_of(Experts(E, I, router))
    x = inputs(40)
    chosen, weights = jax.jit(lambda x, w: route(x, w, router))(x, w)
    assert chosen.shape == weights.shape == (40, router.top_k)
    assert chosen.dtype == jnp.int32
    assert weights.dtype == jnp.float32
    w = float64(w)
    for token, mine, weight in zip(float64(x), chosen, weights, strict=True):
        found = plain_route(token, w, router)
        np.testing.assert_array_equal(mine, list(found))
        np.testing.assert_allclose(weight, list(found.values()), rtol=1e-5)


def test_of_equal_scores_the_first_expert_wins():
    chosen, _ = route(jnp.zeros((2, H)), {"router": jnp.ones((H, E))}, Router(3))
    np.testing.assert_array_equal(chosen, [[0, 1, 2]] * 2)


def test_a_sigmoid_router_chooses_among_saturated_logits():
    w = {"router": jnp.zeros((H, E)).at[0].set(jnp.arange(E) + 40.0)}
    chosen, weights = route(jnp.eye(1, H), w, Router(2, "sigmoid"))
    np.testing.assert_array_equal(chosen, [[7, 6]])
    np.testing.assert_array_equal(weights, [[1, 1]])


def test_negative_scores_are_chosen_before_other_groups():
    router = ROUTERS["sigmoid, biased choice in groups"]
    w = weights_of(Experts(E, I, router)) | {"score_bias": jnp.full(E, -3.0).at[:2].set(-2.0)}
    x = inputs(40)
    chosen, _ = route(x, w, router)
    for token, mine in zip(float64(x), chosen, strict=True):
        np.testing.assert_array_equal(mine, list(plain_route(token, float64(w), router)))


def test_logits_are_float32_where_the_activations_are_bfloat16():
    # 1 and 1 + 2^-9 are one number in bfloat16.
    w = {
        "router": jnp.zeros((H, E), jnp.bfloat16)
        .at[0, 5]
        .set(1)
        .at[1, 5]
        .set(2**-9)
        .at[0, 2]
        .set(1)
    }
    chosen, _ = route(jnp.ones((1, H), jnp.bfloat16), w, Router(1))
    assert chosen.tolist() == [[5]]


# ------------------------------------------------------------------------------------------ experts
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_the_loop_over_experts(name):
    dims = MIXTURES[name]
    w, x = weights_of(dims), inputs(5, 7)
    found = jax.jit(lambda x, w: mixture(x, w, dims))(x, w)
    assert found.shape == x.shape
    close(found, plain_mixture(float64(x).reshape(-1, H), float64(w), dims).reshape(x.shape))


def own(w):
    return {name: w[name] for name in MATRICES if name in w}


@pytest.mark.parametrize("tokens", [1, 3, 90])
@pytest.mark.parametrize("name", ["silu", "clipped, with biases", "weighed input, shared"])
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_of_the_product_are_the_loop(form, name, tokens):
    dims = MIXTURES[name]
    w, x = weights_of(dims), inputs(tokens)
    chosen, weights = route(x, w, dims.router)
    found = jax.jit(lambda *a: FORMS[form](*a, dims))(x, chosen, weights, own(w))
    close(
        found, plain_chosen(*float64((x,)), *map(np.asarray, (chosen, weights)), float64(w), dims)
    )


CHOICES = {
    "all tokens choose one expert": np.full((60, 1), 5),
    "every token chooses all experts": np.tile(np.arange(E), (20, 1)),
    "experts without a token": np.tile([[1, 6], [6, 2]], (30, 1)),
    "one token has the last expert": np.array([[0, 1]] * 40 + [[3, 7]]),
    "no token chooses an expert that is held": np.full((6, 2), E + 3),
    "some of the chosen are elsewhere": np.array([[-2, 3], [E, 0], [7, E + 5], [-1, E]] * 12),
}


@pytest.mark.parametrize("case", CHOICES)
@pytest.mark.parametrize("form", FORMS)
def test_no_token_is_dropped_however_the_choices_fall(form, case):
    chosen = CHOICES[case]
    dims = Experts(E, I, Router(chosen.shape[1]))
    w, x = own(weights_of(dims)), inputs(len(chosen))
    weights = np.abs(np.random.default_rng(2).normal(size=chosen.shape)).astype(np.float32)
    found = jax.jit(lambda *a: FORMS[form](*a, dims))(x, jnp.asarray(chosen), weights, w)
    close(found, plain_chosen(float64(x), chosen, weights, float64(w), dims))


def test_a_token_may_be_alone_and_without_a_batch():
    dims = MIXTURES["silu"]
    w, x = weights_of(dims), inputs(4)
    run = jax.jit(lambda x, w: mixture(x, w, dims))
    close(jnp.stack([run(token, w) for token in x]), run(x, w))


def test_experts_are_summed_in_float32_for_any_dtype():
    # One expert says 256, the others 1 each: summed in bfloat16 they would all be lost.
    dims = Experts(E, I, Router(E))
    w = {
        "router": jnp.zeros((H, E)),
        "gate": jnp.full((E, H, I), 10 / H),
        "up": jnp.ones((E, H, I)) / H,
        "down": jnp.ones((E, I, H)) / I * jnp.asarray([256 * 8] + [8] * 7)[:, None, None] / 10,
    }
    x = jnp.ones((3, H), jnp.bfloat16)
    w = jax.tree.map(lambda m: m.astype(jnp.bfloat16), w)
    y = jax.jit(lambda x, w: mixture(x, w, dims))(x, w)
    assert y.dtype == jnp.bfloat16
    assert np.asarray(y, np.float32).min() >= 262


# ------------------------------------------------------------------------------------ what it costs
@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_flops_scale_with_the_chosen_experts_and_not_with_all(platform, tokens):
    for num_experts in (8, 64, 256):
        for top_k in (4, 8):
            pairs = 2 * 3 * WIDE * WIDE_INNER * tokens * top_k
            found, router = mixture_flops(WIDE, WIDE_INNER, num_experts, top_k, tokens, platform)
            assert pairs <= found <= 1.25 * pairs
            assert router == 2 * WIDE * num_experts * tokens


@pytest.mark.parametrize("kind", ["plain", "fp8 blocks", "mxfp4"])
@pytest.mark.parametrize(("platform", "grouped"), [("tpu", True), ("cuda", False), ("cpu", False)])
def test_only_tpu_is_given_a_ragged_product(platform, grouped, kind):
    w = quantized_weights(kind if kind != "plain" else "fp8 blocks")
    w = dequantized(w) if kind == "plain" else w
    x = wide_inputs().astype(jnp.bfloat16)
    program = jax.jit(lambda x, w: mixture(x, w, QUANTIZED)).trace(x, w)
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in text) == grouped


def test_at_most_twice_the_rows_are_multiplied():
    for pairs in (1, 7, 8, 60, 64, 500, 2048, 5000, 1 << 16):
        for num_experts in (8, 64, 256):
            rows = block_rows(pairs, num_experts)
            at_most = pairs + min(pairs, num_experts) * (rows - 1)
            share = pairs // num_experts
            assert rows in (1, 2, 4, 8, 16, 32, 64, 128, 256)
            assert at_most <= (1.25 if share >= 32 else 2) * pairs


def test_blocks_of_experts_that_are_elsewhere_are_not_multiplied():
    rng = np.random.default_rng(0)
    chosen = jnp.asarray(rng.integers(0, 4 * E, (200, 4)))  # a quarter is held
    slots = sort_by_expert(chosen, E, 4)
    held = int((chosen < E).sum())
    multiplied = int((slots.expert < E).sum())
    assert held <= multiplied <= held + 3 * E < chosen.size / 2
    assert (np.diff(slots.expert) >= 0).all()


# ---------------------------------------------------------------------------------------- on a mesh
LAYOUTS = {
    "expert": (1, 1, 8, 1),
    "fsdp, expert and tensor": (1, 2, 2, 2),
    "data, fsdp and expert": (2, 2, 2, 1),
    "tensor": (1, 1, 1, 8),
    "data": (8, 1, 1, 1),
}


def mesh_of(layout):
    return Mesh(np.array(jax.devices()).reshape(LAYOUTS[layout]), AXES)


@functools.cache
def on_one_device(name):
    dims = MIXTURES[name]
    return jax.jit(lambda x, w: mixture(x, w, dims))(inputs(8, 6), weights_of(dims))


@needs_eight
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["clipped, with biases", "weighed input, shared"])
def test_a_mixture_on_a_mesh_equals_one_device(name, layout):
    dims = MIXTURES[name]
    with axis_rules(mesh_of(layout), RULES):
        found = jax.jit(lambda x, w: mixture(x, w, dims))(inputs(8, 6), weights_of(dims))
    close(found, on_one_device(name))


@needs_eight
@pytest.mark.parametrize("layout", ["expert", "fsdp, expert and tensor"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_tokens_on_every_device_equal_one_device(layout, tokens):
    dims = MIXTURES["clipped, with biases"]
    w, x = weights_of(dims), inputs(1, tokens)
    expected = jax.jit(lambda x, w: mixture(x, w, dims))(x, w)
    with axis_rules(mesh_of(layout), WHOLE_BATCHES):
        close(jax.jit(lambda x, w: mixture(x, w, dims))(x, w), expected)


@needs_eight
def test_no_token_is_dropped_when_one_device_has_all_experts():
    dims = Experts(E, I, Router(1))
    w, x = weights_of(dims), inputs(8, 6)
    w["router"] = jnp.zeros((H, E)).at[0, 6].set(100.0)
    x = x.at[..., 0].set(1.0)
    expected = plain_mixture(float64(x).reshape(-1, H), float64(w), dims).reshape(x.shape)
    with axis_rules(mesh_of("expert"), RULES):
        close(jax.jit(lambda x, w: mixture(x, w, dims))(x, w), expected)


@needs_eight
def test_experts_may_be_split_over_the_batch_axis_alone():
    dims = MIXTURES["silu"]
    rules = [["target_batch", ["fsdp", "data"]], ["target_experts", ["data", "fsdp"]]]
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4, 1, 1), AXES)
    with axis_rules(mesh, rules):
        assert active_rules() == (mesh, {axis: tuple(mesh_axes) for axis, mesh_axes in rules})
        found = jax.jit(lambda x, w: mixture(x, w, dims))(inputs(8, 6), weights_of(dims))
    assert active_rules() is None
    close(found, on_one_device("silu"))


# ---------------------------------------------------------------------------------------- quantized
def fp8(rng, rows, cols, a, b, tiled):
    values = rng.normal(size=(E, rows, cols)).astype(ml_dtypes.float8_e4m3fn)
    scale = np.exp(rng.normal(size=(E, rows // a, cols // b))) * rows**-0.5
    return Quantized(jnp.asarray(values), jnp.asarray(scale, jnp.float32), rows, "fp8", tiled)


def mxfp4(rng, rows, cols, tiled):
    values = rng.integers(0, 256, (E, rows // 2, cols), np.uint8)
    scale = rng.integers(122, 126, (E, rows // 32, cols), np.uint8)
    return Quantized(jnp.asarray(values), jnp.asarray(scale), rows, "mxfp4", tiled)


@functools.cache
def quantized_weights(kind):
    """H 64, I 96: tensor parallelism of 2 and 4 cuts through blocks of 32."""
    rng = np.random.default_rng(3)
    if kind == "mxfp4":
        up, down = (lambda: mxfp4(rng, 64, 128, "in")), mxfp4(rng, 128, 64, "out")
    else:
        a, b = {"fp8 blocks": (32, 32), "fp8 outputs": (None, 1), "fp8 whole": (None, None)}[kind]
        up = lambda: fp8(rng, 64, 96, a or 64, b or 96, "in")  # noqa: E731
        down = fp8(rng, 96, 64, a or 96, b or 64, "out")
    router = normal(rng, 64, E, scale=0.3)
    return {"router": router, "gate": up(), "up": up(), "down": down}


def dequantized(w):
    return {
        name: dequantize(m, jnp.float32) if isinstance(m, Quantized) else m for name, m in w.items()
    }


KINDS = ("fp8 blocks", "fp8 outputs", "fp8 whole", "mxfp4")
QUANTIZED = Experts(E, 96, Router(3))


def wide_inputs():
    return normal(np.random.default_rng(4), 8, 5, 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_quantized_experts_are_multiplied_as_dequantized_ones(kind, form):
    w, x = quantized_weights(kind), wide_inputs()[0]
    chosen, weights = route(x, w, QUANTIZED.router)
    run = jax.jit(lambda *a: FORMS[form](*a, QUANTIZED))
    close(run(x, chosen, weights, own(w)), run(x, chosen, weights, own(dequantized(w))))


@needs_eight
@pytest.mark.parametrize("layout", [(1, 1, 4, 2), (1, 1, 2, 4), (1, 1, 1, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_experts_are_split_where_blocks_are_not(kind, layout):
    w, x = quantized_weights(kind), wide_inputs()
    expected = jax.jit(lambda x, w: mixture(x, w, QUANTIZED))(x, dequantized(w))
    mesh = Mesh(np.array(jax.devices()).reshape(layout), AXES)
    with axis_rules(mesh, RULES):
        close(jax.jit(lambda x, w: mixture(x, w, QUANTIZED))(x, w), expected)


# ------------------------------------------------------------------------------- transformers, live
SIZES = {"hidden_size": H, "num_attention_heads": 4, "num_experts_per_tok": 3, "hidden_act": "silu"}
V3 = SIZES | {
    "moe_intermediate_size": I,
    "n_routed_experts": E,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
V3_DIMS = Experts(
    E, I, dataclasses.replace(ROUTERS["sigmoid, biased choice in groups"], norm_eps=1e-20),
    shared_intermediate_size=2 * I,
)  # fmt: skip
V2 = V3 | {"topk_method": "group_limited_greedy", "norm_topk_prob": False}
MIXTRAL = SIZES | {"intermediate_size": I, "num_local_experts": E}
QWEN = SIZES | {"moe_intermediate_size": I, "num_experts": E, "norm_topk_prob": True}
LIVE = {  # module, block, config, its fields, dimensions
    "deepseek_v2": (
        "DeepseekV2Moe",
        "DeepseekV2Config",
        V2,
        Experts(
            E,
            I,
            Router(3, n_group=4, topk_group=2, routed_scaling_factor=2.5),
            shared_intermediate_size=2 * I,
        ),
    ),
    "deepseek_v2, greedy": (
        "DeepseekV2Moe",
        "DeepseekV2Config",
        V2 | {"topk_method": "greedy"},
        Experts(E, I, Router(3, routed_scaling_factor=2.5), shared_intermediate_size=2 * I),
    ),
    "deepseek_v3": ("DeepseekV3MoE", "DeepseekV3Config", V3, V3_DIMS),
    "glm4_moe": ("Glm4MoeMoE", "Glm4MoeConfig", V3, V3_DIMS),
    "glm4_moe_lite": ("Glm4MoeLiteMoE", "Glm4MoeLiteConfig", V3, V3_DIMS),
    "minimax_m2": (
        "MiniMaxM2SparseMoeBlock",
        "MiniMaxM2Config",
        MIXTRAL,
        Experts(E, I, Router(3, "sigmoid", selection_bias=True, norm_topk_prob=True)),
    ),
    "mixtral": (
        "MixtralSparseMoeBlock",
        "MixtralConfig",
        MIXTRAL,
        Experts(E, I, Router(3, norm_topk_prob=True)),
    ),
    "qwen2_moe": (
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        QWEN | {"norm_topk_prob": False, "shared_expert_intermediate_size": 20},
        Experts(E, I, Router(3), shared_intermediate_size=20, shared_gate=True),
    ),
    "qwen3_moe": (
        "Qwen3MoeSparseMoeBlock",
        "Qwen3MoeConfig",
        QWEN,
        Experts(E, I, Router(3, norm_topk_prob=True)),
    ),
    "gpt_oss": (
        "GptOssMLP",
        "GptOssConfig",
        MIXTRAL,
        Experts(E, I, Router(3, "softmax_top", bias=True), activation="clipped", bias=True),
    ),
    "llama4": (
        "Llama4TextMoe",
        "Llama4TextConfig",
        MIXTRAL | {"num_experts_per_tok": 2},
        Experts(
            E,
            I,
            Router(2, "sigmoid"),
            apply_router_weight_on_input=True,
            shared_intermediate_size=I,
        ),
    ),
}


def live_block(name, block, config, fields):
    """A transformers module with random numbers in every parameter and buffer."""
    torch = pytest.importorskip("torch")
    family = "transformers.models." + name.split(",")[0]
    module = importlib.import_module(f"{family}.modeling_{name.split(',')[0]}")
    configs = importlib.import_module(f"{family}.configuration_{name.split(',')[0]}")
    torch.manual_seed(0)
    block = getattr(module, block)(getattr(configs, config)(**fields)).eval()
    with torch.no_grad():
        for path, tensor in [*block.named_parameters(), *block.named_buffers()]:
            inner = [n for n in tensor.shape[-2:] if n != E] if tensor.ndim > 1 else [1]
            wide = 4.0 if "gate_up" in path else 1.0
            tensor.normal_(0, 0.3 if "correction" in path else wide * min(inner) ** -0.5)
    return torch, block


def our_weights(name, block):
    found = {
        path: jnp.asarray(tensor.detach().numpy())
        for path, tensor in [*block.named_parameters(), *block.named_buffers()]
    }
    w = {}
    for path, tensor in found.items():
        last = path.split(".")[-2:]
        match path.split(".")[0], last[-1]:
            case (("gate" | "router"), "weight"):
                w["router"] = tensor.T
            case "router", "bias":
                w["router_bias"] = tensor
            case _, "e_score_correction_bias":
                w["score_bias"] = tensor
            case (("shared_experts" | "shared_expert"), _):
                w.setdefault("shared", {})[last[0].removesuffix("_proj")] = tensor.T
            case "shared_expert_gate", _:
                w["shared_gate"] = tensor.T
            case "experts", "gate_up_proj" | "gate_up_proj_bias" as which:
                end = which.removeprefix("gate_up_proj")
                if name == "gpt_oss":
                    w["gate" + end], w["up" + end] = tensor[..., ::2], tensor[..., 1::2]
                elif name == "llama4":
                    w["gate"], w["up"] = jnp.split(tensor, 2, -1)
                else:
                    w["gate"], w["up"] = jnp.split(tensor.swapaxes(-1, -2), 2, -1)
            case "experts", "down_proj" | "down_proj_bias" as which:
                transposed = name not in ("gpt_oss", "llama4")
                w[which.replace("_proj", "")] = tensor.swapaxes(-1, -2) if transposed else tensor
            case other:
                raise AssertionError(other)
    return w


@pytest.mark.parametrize("name", LIVE)
def test_a_mixture_equals_the_live_transformers_block(name):
    block, config, fields, dims = LIVE[name]
    torch, block = live_block(name, block, config, fields)
    w, x = our_weights(name, block), inputs(4, 9)
    with torch.no_grad():
        expected = block(torch.tensor(np.asarray(x)))
    expected = expected[0] if isinstance(expected, tuple) else expected
    close(jax.jit(lambda x, w: mixture(x, w, dims))(x, w), expected.numpy().reshape(x.shape))


@pytest.mark.parametrize("name", LIVE)
def test_a_router_equals_the_live_transformers_router(name):
    block, config, fields, dims = LIVE[name]
    torch, block = live_block(name, block, config, fields)
    x = inputs(200)
    chosen, weights = route(x, our_weights(name, block), dims.router)
    mine = np.zeros((200, E), np.float32)
    np.put_along_axis(mine, np.asarray(chosen), np.asarray(weights), axis=1)
    router = getattr(block, "gate", None) or block.router
    extra = (block.e_score_correction_bias,) if name == "minimax_m2" else ()
    with torch.no_grad():
        found = [t.numpy() for t in router(torch.tensor(np.asarray(x)), *extra)]
    expected = found[0]  # of Llama 4: weights of all experts, 0 of those not chosen
    if name != "llama4":
        expected = np.zeros_like(mine)
        np.put_along_axis(expected, found[2], found[1], axis=1)
    np.testing.assert_array_equal(mine > 0, expected > 0)
    close(mine, expected)
