"""Schedules against their formulas, and which parameter takes which optimizer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from config_helpers import init
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from MaxDraft.layers.params import Param
from MaxDraft.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
    optimizer_state_shardings,
    takes_muon,
)

PEAK, STEPS = 0.01, 100
TABLE = {
    "fc": Param((6, 4), ("draft_embed", None), "fc"),
    "layers": {
        "o": Param((4, 8), ("draft_heads", "draft_embed"), "o", layers=range(3)),
        "norm": Param((4,), (None,), "norm", layers=range(3)),
        "experts": Param((2, 4, 8), ("draft_experts", "draft_embed", "draft_mlp"), "e"),
    },
    "embed_tokens": Param((16, 4), ("draft_vocab", "draft_embed"), "embed"),
}


def config(**changes):
    changes = {"learning_rate": PEAK, "warmup_steps_fraction": 0.1} | changes
    defaults = OptimizerConfig.from_config(init("model_name=tiny"))
    return dataclasses.replace(defaults, gradient_clipping_threshold=0.0, **changes)


def rates(steps=STEPS, **changes):
    schedule = learning_rate_schedule(config(**changes), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


# ------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_the_learning_rate_rises_on_a_line_to_its_peak(kind):
    expected = PEAK * (np.arange(11) * (10 / 11) / 10 + 1 / 11)
    np.testing.assert_allclose(rates(lr_schedule_type=kind)[:11], expected, rtol=1e-6)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_falls_by_half_a_cosine_to_the_final_fraction(final):
    progress = np.arange(91) / 90
    shape = final + (1 - final) * 0.5 * (1 + np.cos(math.pi * progress))
    measured = rates(learning_rate_final_fraction=final)[10:]
    np.testing.assert_allclose(measured, PEAK * shape, rtol=1e-6, atol=1e-6 * PEAK)
    np.testing.assert_allclose(measured[-1], PEAK * final, rtol=1e-6, atol=1e-9 * PEAK)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_wsd_stays_and_falls_on_a_line_to_the_final_fraction(final):
    measured = rates(
        lr_schedule_type="wsd", wsd_decay_steps_fraction=0.2, learning_rate_final_fraction=final
    )
    np.testing.assert_allclose(measured[10:81], PEAK, rtol=1e-6)
    line = np.linspace(PEAK, PEAK * final, 21)
    np.testing.assert_allclose(measured[80:], line, rtol=1e-6, atol=1e-6 * PEAK)


def test_wsd_decays_in_the_steps_that_the_warm_up_leaves():
    crowded = rates(lr_schedule_type="wsd", wsd_decay_steps_fraction=0.9, warmup_steps_fraction=0.5)
    assert crowded[50] == pytest.approx(PEAK) == crowded.max()
    assert crowded[-1] == pytest.approx(0.0, abs=1e-9)


def test_wsd_without_a_decay_stays_at_its_peak():
    measured = rates(10, lr_schedule_type="wsd", wsd_decay_steps_fraction=0.0)
    np.testing.assert_allclose(measured[1:10], PEAK, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_schedule_of_few_steps_trains_in_each_of_them(kind, steps):
    measured = rates(steps, lr_schedule_type=kind)[:steps]
    assert (measured > 0).all()
    assert (measured <= PEAK * (1 + 1e-6)).all()


# ------------------------------------------------------------------------------------ optimizers
def test_muon_takes_matrices_without_a_vocabulary():
    taken = jax.tree.map(takes_muon, TABLE)
    assert taken == {
        "fc": True,
        "layers": {"o": True, "norm": False, "experts": True},
        "embed_tokens": False,
    }


def parameters():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    return jax.tree.map(lambda p: jax.random.normal(next(keys), p.full_shape), TABLE)


def first_update(table, params, **changes):
    """-> the update of a first step at a constant learning rate of 1."""
    optimizer = make_optimizer(config(**changes), optax.constant_schedule(1.0), table)
    return optimizer.update(params, optimizer.init(params), params)[0]


def test_muon_updates_each_matrix_of_a_stack_by_itself():
    params = parameters()
    update = first_update(TABLE, params, opt_type="muon")
    for name in ("o", "experts"):
        table = {"alone": Param((4, 8), ("draft_heads", "draft_embed"), "alone")}
        for index, matrix in enumerate(params["layers"][name]):
            alone = first_update(table, {"alone": matrix}, opt_type="muon")["alone"]
            # Float32 products of the same numbers, summed in another order: 5 iterations of
            # Newton-Schulz on matrices of 4 rows keep the difference below 100 roundings.
            np.testing.assert_allclose(
                update["layers"][name][index], alone, rtol=0, atol=100 * 2**-23
            )


def test_muon_updates_have_the_root_mean_square_of_adamw():
    update = first_update(TABLE, parameters(), opt_type="muon")
    for matrix in update["layers"]["o"]:
        # All 4 singular values are 0.7 to 1.2 (Newton-Schulz' coefficients) of 0.2 sqrt(8).
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False) / (0.2 * math.sqrt(8))
        assert values.min() > 0.65
        assert values.max() < 1.25


@pytest.mark.parametrize("path", [("layers", "norm"), ("embed_tokens",)])
def test_beside_muon_adamw_updates_the_rest_as_alone(path):
    params = parameters()
    beside = first_update(TABLE, params, opt_type="muon")
    alone = first_update(TABLE, params, opt_type="adamw")
    for name in path:
        beside, alone = beside[name], alone[name]
    np.testing.assert_array_equal(beside, alone)


def test_clipping_scales_the_gradient_to_its_threshold():
    # Two steps of AdamW with b1 = b2 = 0: the moments are the last gradient and its square.
    params = {"w": jnp.array([[3.0, 4.0]])}
    table = {"w": Param((1, 2), (None, None), "w")}
    clipped = dataclasses.replace(config(adam_b1=0.0), gradient_clipping_threshold=0.5)
    optimizer = make_optimizer(clipped, optax.constant_schedule(1.0), table)
    _, state = optimizer.update(params, optimizer.init(params), params)
    moments = next(
        part.mu
        for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )
    np.testing.assert_allclose(moments["w"], [[0.3, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("opt_type", ["adamw", "muon"])
def test_a_moment_is_sharded_as_its_parameter(opt_type):
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec("fsdp")), TABLE)
    optimizer = make_optimizer(config(opt_type=opt_type), optax.constant_schedule(1.0), TABLE)
    state = jax.eval_shape(optimizer.init, parameters())
    sizes = {param.full_shape for param in jax.tree.leaves(TABLE)}
    placed = optimizer_state_shardings(state, shardings, replicated)
    for shape, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert (sharding == replicated) == (shape.shape not in sizes)
    moments = sum(shape.shape in sizes for shape in jax.tree.leaves(state))
    # AdamW has two moments a parameter; Muon has one for each of its three.
    assert moments == {"adamw": 2 * 5, "muon": 2 * 2 + 3}[opt_type]
