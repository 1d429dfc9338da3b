"""Losses and gradients do not depend on the mesh; what cannot be split is a clear error."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from MaxDraft import pyconfig, sharding
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.drafts.eagle3.head import head_params
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Param
from MaxDraft.layers.rope import Rope
from MaxDraft.sharding import ShardingError, axis_rules, constrain
from MaxDraft.targets import decoder
from MaxDraft.targets.table import decoder_params
from MaxDraft.train_step import FrozenParams

BASE = yaml.safe_load((Path(__file__).parents[1] / "configs" / "base.yml").read_text())
RULES = BASE["logical_axis_rules"]
AXES = tuple(BASE["mesh_axes"])
LAYOUTS = {
    "replicated": (8, 1, 1, 1),
    "fsdp": (1, 8, 1, 1),
    "expert": (1, 1, 8, 1),
    "tensor": (1, 1, 1, 8),
    "mixed": (2, 2, 1, 2),
}

B, T, K, V = 8, 12, 2, 32
ROPE = Rope(theta=10000.0, rotary_dim=4)
TARGET = models.llama(V, 16, 32, 4, 8, 8, 4, ROPE)
CAPTURE = (0, 1, 2)
HEAD = HeadDims(16, 32, 8, 8, 4, 16, V, 1e-6, ROPE)
TABLES = (head_params(HEAD), decoder_params(TARGET, CAPTURE, jnp.float32))

needs_eight = pytest.mark.skipif(len(jax.devices()) != 8, reason="needs eight devices")


def batch_of_two_documents_a_row():
    rng = np.random.default_rng(0)
    turns = np.tile([0] + [1] * 5 + [0] + [1] * 4 + [0], (B, 1))
    return {
        "tokens": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "positions": jnp.asarray(np.tile([*range(6), *range(6)], (B, 1)), jnp.int32),
        "segment_ids": jnp.asarray(np.tile([1] * 6 + [2] * 6, (B, 1)), jnp.int32),
        "turn_ids": jnp.asarray(turns, jnp.int32),
    }


def initial():
    return tuple(parameters.initialize(table, seed) for seed, table in enumerate(TABLES))


@functools.cache
def step_on(layout, devices=8):
    """One training step, and the held-out sums before it: (moments, metrics, sums)."""
    config = pyconfig.initialize(
        [
            "train.py",
            str(Path(__file__).parents[1] / "configs" / "base.yml"),
            "dtype=float32",
            f"ttt_length={K}",
            "attention_block_size=5",
            "vocab_block_size=5",
            "rollout_block_size=7",
            "gradient_clipping_threshold=0",
        ]
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(layout), AXES)
    built = models.training_programs(config, TARGET, HEAD, mesh, captured_layers=CAPTURE)
    head, target = initial()
    draft_ids = np.arange(0, V, 2, dtype=np.int32)
    frozen = FrozenParams(
        jax.device_put(target, parameters.shardings(TABLES[1], mesh, RULES)),
        jnp.asarray(draft_ids),
    )
    batch = {name: x[None] for name, x in batch_of_two_documents_a_row().items()}
    batch = jax.device_put(batch, built.batch_shardings)
    state = built.initialize(head)
    sums = built.evaluate(state.params, frozen, batch)
    state, found = built.train(state, frozen, batch)
    return jax.device_get((state.optimizer, found, sums))


@pytest.mark.slow
@needs_eight
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_have_the_gradients_of_one(layout):
    # Moments are linear and quadratic in the gradient: they compare gradients without a division.
    expected = step_on((1, 1, 1, 1), devices=1)
    assert (expected[2]["in_vocab_positions"] > 0).all()
    for mine, theirs in zip(
        jax.tree.leaves(step_on(LAYOUTS[layout])), jax.tree.leaves(expected), strict=True
    ):
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()


@needs_eight
@pytest.mark.parametrize(
    ("layout", "shares"),
    [
        ("replicated", (1, 1)),
        ("fsdp", (8, 8)),
        ("expert", (8, 8)),
        ("tensor", (8, 8)),
        ("mixed", (4, 4)),
    ],
)
def test_a_layout_splits_the_matrices_over_its_devices(layout, shares):
    mesh = sharding.make_mesh(AXES, LAYOUTS[layout], (1, 1, 1, 1))
    for table, matrix, share in zip(
        TABLES, (lambda p: p["q"], lambda p: p["layers"][0][0]["q"]), shares, strict=True
    ):
        placement = matrix(parameters.shardings(table, mesh, RULES))
        shape = matrix(table).full_shape
        assert np.prod(shape) == share * np.prod(placement.shard_shape(shape))


@needs_eight
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_drafts_batch_is_split_over_every_device(layout):
    mesh = sharding.make_mesh(AXES, LAYOUTS[layout], (1, 1, 1, 1))
    with axis_rules(mesh, RULES):
        out = jax.jit(lambda x: constrain(x, "draft_batch", None))(jnp.zeros((16, 3)))
    assert out.sharding.shard_shape(out.shape) == (2, 3)
    assert len({str(shard.index) for shard in out.addressable_shards}) == 8


def test_constrain_is_the_identity_where_no_rules_are_active():
    x = jnp.ones((3, 5))  # 3 rows, which eight devices could not share
    assert constrain(x, "draft_batch", None) is x
    mesh = sharding.make_mesh(AXES, (-1, 1, 1, 1), (1, 1, 1, 1))
    with axis_rules(mesh, RULES):
        pass
    assert constrain(x, "draft_batch", None) is x


@needs_eight
def test_an_indivisible_dimension_names_parameter_and_axis():
    mesh = sharding.make_mesh(AXES, (1, 8, 1, 1), (1, 1, 1, 1))
    table = {"mlp": {"up": Param((12, 8), ("target_embed", "target_mlp"), "up")}}
    with pytest.raises(ShardingError, match=r"mlp/up.*\(12, 8\).*12 cannot.* 8 devices.*fsdp"):
        parameters.shardings(table, mesh, RULES)


@needs_eight
def test_more_devices_than_key_heads_give_the_same_outputs():
    # 2 key/value heads of size 4 make 8 columns, which 8 devices can share though the heads cannot.
    dims = models.llama(V, 16, 32, 4, 8, 2, 4, ROPE)
    table = decoder_params(dims, CAPTURE, jnp.float32)
    target, batch = parameters.initialize(table, 0), batch_of_two_documents_a_row()

    def features(target, batch):
        arrays = (batch[name] for name in ("tokens", "positions", "segment_ids"))
        return decoder.forward(target, *arrays, dims, CAPTURE, jnp.float32, 5)[1]

    expected = jax.jit(lambda *args: features(*args))(target, batch)
    mesh = sharding.make_mesh(AXES, (1, 1, 1, 8), (1, 1, 1, 1))
    placed = jax.device_put(target, parameters.shardings(table, mesh, RULES))
    with axis_rules(mesh, RULES):
        ours = jax.jit(features)(placed, batch)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_one_open_parallelism_takes_what_remains():
    assert sharding.fill_parallelism((2, -1, 2), 8, "ici") == (2, 2, 2)
    assert sharding.fill_parallelism((1, -1, 1), 8, "ici") == (1, 8, 1)
    assert sharding.fill_parallelism((2, 2, 2), 8, "ici") == (2, 2, 2)


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (4, 4, 1), (16, -1, 1), (-1, -1, 1)])
def test_a_wrong_product_of_parallelism_names_the_numbers(sizes):
    with pytest.raises(ShardingError, match=r"ici_\*_parallelism.*8 devices"):
        sharding.fill_parallelism(sizes, 8, "ici")


def test_a_mesh_axis_on_two_dimensions_is_an_error():
    mesh = sharding.make_mesh(AXES, (-1, 1, 1, 1), (1, 1, 1, 1))
    rules = [["a", ["data", "fsdp"]], ["b", ["fsdp"]]]
    with pytest.raises(ShardingError, match=r"'fsdp'.*two dimensions"):
        sharding.named_sharding(mesh, rules, ("a", "b"))


def test_logical_axes_become_mesh_axes_by_the_rules():
    mesh = sharding.make_mesh(AXES, (-1, 1, 1, 1), (1, 1, 1, 1))
    rules = [["a", ["data", "fsdp"]], ["b", ["tensor"]], ["c", []]]
    found = sharding.named_sharding(mesh, rules, (None, "a", "b"))
    assert found == NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), "tensor"))
    assert sharding.named_sharding(mesh, rules, ("c",)).spec == PartitionSpec(None)


@needs_eight
def test_a_parameters_draw_does_not_depend_on_the_mesh():
    table, alone = TABLES[0], initial()[0]
    mesh = sharding.make_mesh(AXES, (1, 4, 1, 2), (1, 1, 1, 1))
    placement = parameters.shardings(table, mesh, RULES)
    drawn = jax.jit(lambda: parameters.initialize(table, 0), out_shardings=placement)()
    for mine, theirs in zip(jax.tree.leaves(drawn), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
