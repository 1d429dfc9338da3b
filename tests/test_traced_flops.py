"""traced_flops.py against XLA's own count where XLA has one, and against numbers by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import recipe
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from models import ROPE

from MaxDraft.cost import flops
from MaxDraft.cost.traced_flops import count
from MaxDraft.drafts.eagle3.dims import HeadDims, check_captured_layers
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.layers import params as parameters
from MaxDraft.targets import decoder
from MaxDraft.targets.dims import Attention
from MaxDraft.targets.registry import dims_from_config
from MaxDraft.targets.table import decoder_params

X, W = jnp.ones((4, 6)), jnp.ones((6, 10))
PRODUCT = 2 * 4 * 6 * 10  # of X @ W
on_cpu = functools.partial(count, platform="cpu")

needs_eight = pytest.mark.skipif(len(jax.devices()) != 8, reason="needs eight devices")


def by_xla(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def convolved(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), **options
    )


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (jnp.matmul, [(4, 6), (6, 10)]),
        (jnp.matmul, [(3, 4, 6), (3, 6, 10)]),
        (lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), [(2, 5, 3, 8), (2, 7, 3, 8)]),
        (lambda a, b: jnp.einsum("abc,dcb->ad", a, b), [(2, 3, 4), (5, 4, 3)]),
        (lambda a, b, c: a @ b @ c, [(4, 6), (6, 10), (10, 3)]),
        (convolved, [(2, 9, 4), (3, 4, 5)]),
        (functools.partial(convolved, feature_group_count=4), [(2, 9, 4), (3, 1, 4)]),
    ],
)
def test_products_and_convolutions_count_as_xla_counts_them(function, shapes):
    args = [jnp.ones(shape) for shape in shapes]
    assert on_cpu(function, *args) == by_xla(function, *args)


def test_nothing_but_products_and_convolutions_counts():
    assert on_cpu(lambda x: jax.lax.top_k(jnp.exp(x).sum(0) + jnp.argsort(x[0]), 2), X) == 0


def test_shapes_are_enough():
    x, w = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (X, W))
    assert on_cpu(jnp.matmul, x, w) == PRODUCT


def test_a_scan_counts_as_often_as_it_runs():
    def function(x, w):
        return jax.lax.map(lambda _: jax.lax.map(lambda _: x @ w, jnp.arange(3)), jnp.arange(5))

    assert on_cpu(function, X, W) == 15 * PRODUCT


def test_of_branches_the_most_expensive_counts():
    def function(i, x, w):
        branches = [lambda: x @ w, lambda: x @ w @ w.T @ w, lambda: jnp.zeros((4, 10))]
        return jax.lax.switch(i, branches)

    assert on_cpu(function, 0, X, W) == 3 * PRODUCT


@pytest.mark.parametrize(("platform", "products"), [("tpu", 2), ("cuda", 3), ("cpu", 1)])
def test_of_platforms_the_one_asked_for_counts(platform, products):
    def times(n):
        return lambda x, w: sum(x @ w for _ in range(n))

    def function(x, w):
        return jax.lax.platform_dependent(x, w, tpu=times(2), cuda=times(3), default=times(1))

    assert count(function, X, W, platform=platform) == products * PRODUCT


def test_a_ragged_product_multiplies_every_row_once():
    def function(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([1, 3, 0]))

    assert on_cpu(function, X, jnp.ones((3, 6, 10))) == PRODUCT


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, jax.checkpoint, lambda f: jax.custom_jvp(f), lambda f: jax.custom_vjp(f)],
)
def test_programs_inside_programs_are_entered(wrap):
    wrapped = wrap(jnp.matmul)
    if isinstance(wrapped, jax.custom_vjp):
        wrapped.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))
    if isinstance(wrapped, jax.custom_jvp):
        wrapped.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
    assert on_cpu(lambda x, w: wrapped(x, w) + 1, X, W) == PRODUCT


def test_recomputation_in_a_gradient_counts():
    def loss(w, policy):
        return jax.checkpoint(lambda w: jnp.sin(jnp.sin(X @ w) @ w.T).sum(), policy=policy)(w)

    saved, recomputed = (
        on_cpu(jax.grad(functools.partial(loss, policy=policy)), W)
        for policy in (
            jax.checkpoint_policies.everything_saveable,
            jax.checkpoint_policies.nothing_saveable,
        )
    )
    # 2 forward, 1 for the inner activations, 2 for w.
    assert saved == 5 * PRODUCT
    assert recomputed > saved


@needs_eight
def test_what_runs_on_every_device_counts_for_every_device():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "idle"))

    def function(x, w):
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"))(
            x, w
        )

    assert on_cpu(function, X, W) == 2 * PRODUCT  # rows once, on both idle devices


def test_products_that_run_who_knows_how_often_are_an_error():
    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="while"):
        on_cpu(function, jnp.ones((3, 3)))
    assert on_cpu(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x), 1) == 0


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3", "llama4_scout"])
def test_the_targets_model_flops_are_those_of_its_traced_program(family):
    # Counted by hand, attention is the causal half; the program has one block, the whole row.
    dims = dims_from_config(recipe.CONFIGS[family])
    capture, length = check_captured_layers((), dims.num_layers), 64
    wide = dataclasses.replace(
        dims,
        layers=tuple(
            dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, chunk=0))
            if isinstance(layer.mixer, Attention)
            else layer
            for layer in dims.layers
        ),
    )
    head = Eagle3(HeadDims(64, 64, 4, 2, 16, 50, 200, 1e-6, ROPE))
    parts = flops.per_token(wide, head, 1, length)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def features(params, tokens, positions, segments):
        return decoder.forward(
            params, tokens, positions, segments, dims, capture, jnp.float32, length
        )

    params = parameters.abstract(decoder_params(dims, capture, jnp.float32))
    counted = count(features, params, row, row, row, platform="tpu")
    expected = length * (parts["target layers"] + 2 * parts["target attention"])
    assert counted == pytest.approx(expected, rel=1e-6)
