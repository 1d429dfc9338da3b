"""Decoding is split over the devices of a mesh, and nothing in the replies changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import decode_spec
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models import CAPTURE, random_head, random_target, tiny_dims, tiny_head_dims

from MaxDraft import config_layers
from MaxDraft.decoding.generate import prefill
from MaxDraft.decoding.prompts import compile_decode, decode_prompts
from MaxDraft.decoding.state import DecodeParams
from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.layers import params as parameters
from MaxDraft.sharding import axis_rules, partition_spec
from MaxDraft.targets.table import decoder_params

TARGET = tiny_dims(vocab_size=16)
HEAD = tiny_head_dims(TARGET, draft_vocab_size=8)
AXES = ("data", "fsdp", "expert", "tensor")
SHAPES = ((1, 8, 1, 1), (2, 2, 1, 2))
PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 0, 2], [3], [8, 8], [9, 1, 12], [2], [4, 4]]
SPEC = decode_spec(TARGET, CAPTURE, HEAD, max_new_tokens=12, temperature=1.0)

needs_eight = pytest.mark.skipif(len(jax.devices()) != 8, reason="needs eight devices")


def rules():
    return config_layers.defaults()["logical_axis_rules"]


def make_params(mesh=None):
    """The same random pair, on one device or as the rules place it on a mesh."""
    target, head = random_target(TARGET), random_head(HEAD)
    ids = jnp.array([0, 2, 4, 5, 8, 9, 11, 14], jnp.int32)
    if mesh is not None:
        tables = decoder_params(TARGET, CAPTURE, jnp.float32), eagle3.head_params(HEAD)
        places = (parameters.shardings(table, mesh, rules()) for table in tables)
        target, head = map(jax.device_put, (target, head), places)
        ids = jax.device_put(ids, NamedSharding(mesh, PartitionSpec()))
    return DecodeParams(target, head, ids)


def decoded(spec, params, batch_size):
    """-> replies, verify steps, accepted drafts; and the calls of the compiled program."""
    decode, calls = compile_decode(spec), []

    def counted(*args):
        calls.append(args)
        return decode(*args)

    found = decode_prompts(counted, params, PROMPTS, batch_size)
    return (found.replies, found.verify_steps, found.accepted_drafts.tolist()), len(calls)


@needs_eight
@pytest.mark.parametrize("spec", [SPEC, SPEC.without_drafts()], ids=["sampled", "no drafts"])
def test_a_mesh_gives_the_replies_of_one_device(spec):
    expected, calls = decoded(spec, make_params(), batch_size=1)
    assert calls == 1 + len(PROMPTS)  # the first compiles
    for shape in SHAPES:
        mesh = Mesh(np.array(jax.devices()).reshape(shape), AXES)
        with axis_rules(mesh, rules()):
            found, calls = decoded(spec, make_params(mesh), batch_size=8)
        assert found == expected
        assert calls == 1 + 2


@needs_eight
@pytest.mark.parametrize("shape", SHAPES)
def test_caches_lie_where_their_prompts_do(shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), AXES)
    table = {axis: tuple(mesh_axes) for axis, mesh_axes in rules()}
    with axis_rules(mesh, rules()):
        params = make_params(mesh)
        tokens = jnp.zeros((8, 4), jnp.int32)
        keys = jax.random.split(jax.random.key(0), 8)
        run = jax.jit(functools.partial(prefill, SPEC))
        state = run(params, tokens, jnp.full(8, 4), keys)

    def expect(cache, *axes):
        wanted = NamedSharding(mesh, partition_spec(axes, table))
        for leaf in jax.tree.leaves(cache):
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.sharding, wanted)

    expect(state.target_cache, None, "target_batch", None, "target_kv_heads", None)
    expect(state.drafter_cache, "draft_batch", None, None, None)
