"""Blockwise attention and attention over a cache equal a dense softmax; so do the gradients.

The kernels of layers/experimental are interpreted here, as jax operations on the CPU."""

import re

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxDraft.layers.attention import (
    cached_attention,
    document_starts,
    interval_attention,
    merge_own_keys,
    packed_attention,
    slots_up_to,
    write_slots,
)
from MaxDraft.layers.attention_keys import PLAIN, KeyValueBlocks, Scoring

TOLERANCE = 1e-5
SEGMENTS = np.array([[1] * 5 + [2] * 7 + [3] * 4 + [0] * 2, [1] * 18])  # [B, T]


def make(own_keys, num_kv_heads=2, seed=0):
    """q, k, v and, where own_keys > 0, every row's own keys and values; float64."""
    rng = np.random.default_rng(seed)
    B, T, N, M, J, d = *SEGMENTS.shape, 4, num_kv_heads, own_keys, 6
    shapes = [(B, T, N, d), (B, T, M, d), (B, T, M, d)] + [(B, T, J, M, d)] * 2 * (J > 0)
    return [1.5 * rng.normal(size=shape) for shape in shapes]


def one_row(q, k, v, segments, own_k=(), own_v=()):
    """NumPy, a query and a head at a time: q [T, N, d], k and v [T, M, d] -> [T, N, d]."""
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        for n in range(q.shape[1]):
            m = n // group
            visible = [j for j in range(i + 1) if segments[j] == segments[i]]
            keys = [k[j, m] for j in visible] + [own[m] for own in (own_k[i] if len(own_k) else [])]
            values = [v[j, m] for j in visible] + [
                own[m] for own in (own_v[i] if len(own_v) else [])
            ]
            scores = np.exp(np.array([q[i, n] @ key for key in keys]) / np.sqrt(q.shape[-1]))
            out[i, n] = (scores / scores.sum()) @ np.array(values)
    return out


def dense(q, k, v, own_k=None, own_v=None):
    """All scores at once, for autodiff in float64: same heads order, keys beside own keys."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    scores = jnp.einsum("bind,bjnd->bnij", q, k) / np.sqrt(q.shape[-1])
    visible = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & np.tri(T, dtype=bool)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    if own_k is not None:
        own_k, own_v = jnp.repeat(own_k, group, 3), jnp.repeat(own_v, group, 3)
        beside = jnp.einsum("bind,bijnd->bnij", q, own_k) / np.sqrt(q.shape[-1])
        scores = jnp.concatenate([scores, beside], -1)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    out = jnp.einsum("bnij,bjnd->bind", weights[..., :T], v)
    if own_k is not None:
        out = out + jnp.einsum("bnij,bijnd->bind", weights[..., T:], own_v)
    return out


KERNELS = ("xla", "tpu", "gpu")
interpreted = pytest.mark.usefixtures("interpreted_kernels")


def block_for(kernel, block):
    """The blocks of a GPU's kernel are powers of two from 16 up."""
    return (16 if block < 32 else 64) if kernel == "gpu" else block


ROWS = jnp.broadcast_to(jnp.arange(SEGMENTS.shape[1]), SEGMENTS.shape)


def attended(q, k, v, own, block, kernel, gradients=None):
    """Every row as the rollout attends: step-0 keys, then its own [B, T, J, M, d]; gradients."""
    first = document_starts(jnp.asarray(SEGMENTS))
    keys = KeyValueBlocks.from_arrays(k, v, block_for(kernel, block), kernel=kernel)
    out, logsumexp, gradients = interval_attention(q, keys, gradients, first, ROWS)
    if own:
        out = merge_own_keys(out, logsumexp, q, *(jnp.moveaxis(x, 2, 0) for x in own))
    return out, gradients


def narrow(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize("own_keys", [0, 1, 3, 6])
@pytest.mark.parametrize(("block", "num_kv_heads"), [(5, 2), (6, 1), (18, 4), (100, 2)])
@pytest.mark.parametrize("kernel", KERNELS)
@interpreted
def test_attention_equals_a_loop_over_queries_and_keys(own_keys, block, num_kv_heads, kernel):
    arrays = make(own_keys, num_kv_heads)
    expected = [
        one_row(*(x[b] for x in arrays[:3]), SEGMENTS[b], *(x[b] for x in arrays[3:]))
        for b in range(len(SEGMENTS))
    ]
    q, k, v, *own = narrow(arrays)
    computed, _ = attended(q, k, v, own, block, kernel)
    assert harness.relative_error(computed, np.stack(expected)) < TOLERANCE
    if not own_keys:
        block = block_for(kernel, block)
        same = packed_attention(q, k, v, jnp.asarray(SEGMENTS), block, kernel=kernel)
        np.testing.assert_array_equal(same, computed)


@pytest.mark.parametrize("own_keys", [0, 3, 6])
@pytest.mark.parametrize(("block", "num_kv_heads"), [(5, 2), (6, 1), (100, 4)])
@pytest.mark.parametrize("kernel", KERNELS)
@interpreted
def test_gradients_equal_dense_attention_in_float64(own_keys, block, num_kv_heads, kernel):
    arrays = make(own_keys, num_kv_heads)
    direction = np.random.default_rng(1).normal(size=arrays[0].shape)

    def total(*arrays):
        return (dense(*arrays) * direction).sum()

    with jax.enable_x64(True):
        expected = jax.grad(total, tuple(range(len(arrays))))(*(jnp.asarray(x) for x in arrays))
        assert expected[0].dtype == jnp.float64
        expected = [np.asarray(x) for x in expected]

    q, k, v, *own = narrow(arrays)

    zeros = KeyValueBlocks.from_arrays(k, v, block_for(kernel, block), kernel=kernel).zeros()
    _, pull_back = jax.vjp(
        lambda *args: attended(args[0], k, v, args[1], block, kernel, args[2]), q, own, zeros
    )
    d_q, d_own, d_keys = pull_back((jnp.asarray(direction, jnp.float32), zeros))
    computed = (d_q, *d_keys.arrays(k.shape[1]), *d_own)
    for one, other in zip(computed, expected, strict=True):
        assert harness.relative_error(one, other) < TOLERANCE
    _, _, twice = pull_back((jnp.asarray(direction, jnp.float32), d_keys))
    for once, sum_of_two in zip((d_keys.k, d_keys.v), (twice.k, twice.v), strict=True):
        np.testing.assert_allclose(sum_of_two, 2 * once, rtol=1e-5, atol=1e-6)


SCORINGS = {
    "plain": (Scoring(), False),
    "window": (Scoring(window=3, scale=0.3), False),
    "chunk": (Scoring(chunk=4), False),
    "softcap": (Scoring(softcap=1.5), True),
}


@pytest.mark.parametrize("name", SCORINGS)
@pytest.mark.parametrize("block", [5, 100])
@pytest.mark.parametrize("kernel", KERNELS)
@interpreted
def test_target_attention_gradients_equal_dense_ones(name, block, kernel):
    scoring, with_sinks = SCORINGS[name]
    arrays = [*make(0), np.random.default_rng(2).normal(size=4)]
    direction = np.random.default_rng(1).normal(size=arrays[0].shape)
    positions = np.arange(SEGMENTS.shape[1]) - np.asarray(document_starts(jnp.asarray(SEGMENTS)))

    def plainly(q, k, v, sinks):
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
        scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
        scores = jnp.einsum("bind,bjnd->bnij", q, k) * scale
        if scoring.softcap:
            scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
        rows = np.arange(SEGMENTS.shape[1])
        behind = rows[:, None] - rows
        visible = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (behind >= 0)
        if scoring.window:
            visible &= behind < scoring.window
        if scoring.chunk:
            chunks = positions // scoring.chunk
            visible &= chunks[:, :, None] == chunks[:, None]
        scores = jnp.where(visible[:, None], scores, -jnp.inf)
        column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        if with_sinks:
            scores = jnp.concatenate([scores, column], -1)
        weights = jax.nn.softmax(scores, -1)[..., : len(rows)]
        return (jnp.einsum("bnij,bjnd->bind", weights, v) * direction).sum()

    def total(q, k, v, sinks):
        options = {"scoring": scoring, "positions": jnp.asarray(positions), "kernel": kernel}
        options["sinks"] = sinks if with_sinks else None
        out = packed_attention(q, k, v, jnp.asarray(SEGMENTS), block_for(kernel, block), **options)
        return (out * direction).sum().astype(jnp.float32)

    with jax.enable_x64(True):
        expected = jax.value_and_grad(plainly, (0, 1, 2, 3))(*(jnp.asarray(x) for x in arrays))
        expected = jax.tree.map(np.asarray, expected)
    computed = jax.value_and_grad(total, (0, 1, 2, 3))(*narrow(arrays))
    assert float(computed[0]) == pytest.approx(float(expected[0]), rel=1e-4)
    for one, other in list(zip(computed[1], expected[1], strict=True))[: 3 + with_sinks]:
        assert harness.relative_error(one, other) < TOLERANCE


@pytest.mark.parametrize("block", [1, 4, 7, 32])
@pytest.mark.parametrize("kernel", KERNELS)
@interpreted
def test_queries_in_any_order_see_their_interval_only(block, kernel):
    rng = np.random.default_rng(3)
    R, T, N, M, d = 13, 17, 4, 2, 6
    q, k, v = (rng.normal(size=(1, n, h, d)) for n, h in ((R, N), (T, M), (T, M)))
    first = rng.integers(0, T, (1, R))
    last = np.minimum(
        first + rng.integers(-3, 9, (1, R)), T - 1
    )  # there are queries that see nothing
    assert (last < first).any()
    keys = KeyValueBlocks.from_arrays(*narrow([k, v]), block_for(kernel, block), kernel=kernel)
    out, logsumexp, _ = interval_attention(*narrow([q]), keys, None, first, last)
    for i, n in np.ndindex(R, N):
        visible = np.s_[0, first[0, i] : last[0, i] + 1, n // 2]
        scores = np.exp(k[visible] @ q[0, i, n] / np.sqrt(d))
        if len(scores):
            expected = scores @ v[visible] / scores.sum()
            np.testing.assert_allclose(out[0, i, n], expected, rtol=1e-5, atol=1e-6)
            assert float(logsumexp[0, i, n]) == pytest.approx(np.log(scores.sum()), abs=1e-5)
        else:
            assert not np.asarray(out[0, i, n]).any()
            assert logsumexp[0, i, n] < -1e20


@pytest.mark.parametrize("kernel", KERNELS[1:])
@interpreted
def test_blocks_of_queries_add_to_gradients_so_far(kernel):
    rng = np.random.default_rng(4)
    R, T, d, dv = 200, 700, 20, 40  # several blocks of a GPU's 64 in one of ours
    q, k, v = narrow(rng.normal(size=(2, *shape)) for shape in ((R, 4, d), (T, 2, d), (T, 2, dv)))
    first = jnp.asarray(rng.integers(0, T, (2, R)))
    last = jnp.minimum(first + rng.integers(-5, 300, (2, R)), T - 1)
    results = []
    for name, block in (("xla", 64), (kernel, 256)):
        keys = KeyValueBlocks.from_arrays(k, v, block, kernel=name)
        there = jax.tree.map(jnp.ones_like, keys.zeros())
        attend = jax.vjp(
            lambda q, g, keys=keys: interval_attention(q, keys, g, first, last), q, there
        )
        (out, logsumexp, _), pull_back = attend
        sees_a_key = (logsumexp > -1e20).astype(jnp.float32)
        d_q, gradients = pull_back((jnp.cos(out), sees_a_key * jnp.sin(logsumexp), there))
        results.append((out, sees_a_key * logsumexp, d_q, *gradients.arrays(T)))
    for one, other in zip(*results, strict=True):
        assert harness.relative_error(one, other) < TOLERANCE


@interpreted
def test_blocks_a_gpu_cannot_divide_are_an_error():
    q, k = jnp.zeros((1, 4, 2, 16)), jnp.zeros((1, 200, 2, 16))
    rows = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="blocks of 100 keys"):
        interval_attention(q, KeyValueBlocks.from_arrays(k, k, 100, kernel="gpu"), None, rows, rows)


@pytest.mark.parametrize(("group", "d", "dv"), [(1, 128, 128), (4, 64, 64), (16, 192, 128)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("kernel", "platform", "call"),
    [
        ("tpu", "tpu", "@tpu_custom_call"),
        ("gpu", "cuda", r"@(__gpu\$xla\.gpu\.triton|triton_kernel)"),
    ],
)
def test_the_kernels_lower_for_their_device(kernel, platform, call, dtype, group, d, dv):
    def lower(function, *arrays):
        traced = jax.jit(function).trace(*arrays)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    def total(q, k, v, segments):
        scoring = Scoring(window=300, softcap=30.0)
        out = packed_attention(q, k, v, segments, 256, scoring=scoring, kernel=kernel)
        return out.astype(jnp.float32).sum()

    shapes = [(2, 600, 2 * group, d), (2, 600, 2, d), (2, 600, 2, dv)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    arrays.append(jax.ShapeDtypeStruct((2, 600), jnp.int32))
    lowered = lower(jax.grad(total, (0, 1, 2)), *arrays)
    assert len(re.findall(call, lowered)) == 3  # forward, queries, keys

    def of_intervals(q, k, v, first, last):
        keys = KeyValueBlocks.from_arrays(k, v, 256, 600, kernel)
        _, pull_back = jax.vjp(
            lambda *x: interval_attention(*x, first, last), q, keys, keys.zeros()
        )
        return pull_back((q[..., :dv], jnp.ones(q.shape[:3]), keys.zeros()))[::2]

    arrays = [x.update(shape=(1, *x.shape[1:])) for x in arrays[:3]]
    arrays += 2 * [jax.ShapeDtypeStruct((1, 600), jnp.int32)]
    lowered = lower(of_intervals, *arrays)
    assert len(re.findall(call, lowered)) == 3


def test_large_scores_do_not_overflow_the_softmax():
    q, k, v = make(0)
    computed = packed_attention(*narrow([100 * q, 100 * k, v]), jnp.asarray(SEGMENTS), 5)
    assert np.isfinite(computed).all()


def test_scores_of_bfloat16_inputs_are_float32():
    # Scores 64 and 64.25 are one number in bfloat16, which would weigh both keys alike.
    q = jnp.asarray([[1, 1, 0, 0], [1, 1, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    k = jnp.asarray([[128, 0, 0, 0], [128, 0.5, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.asarray([[0, 0, 0, 0], [1, 1, 1, 1]], jnp.bfloat16).reshape(1, 2, 1, 4)
    expected = 1 / (1 + np.exp(-0.25))
    for out in (
        packed_attention(q, k, v, jnp.ones((1, 2), jnp.int32), 2),
        cached_attention(q, k, v, slots_up_to(jnp.arange(2)[None], 2)),
    ):
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out[0, 1, 0].astype(np.float32), expected, atol=0.01)


@pytest.mark.parametrize("fed", [1, 4, 18])
def test_attention_over_a_cache_equals_packed_attention(fed):
    # The second row is one document; its last tokens are fed against a cache with room to spare.
    q, k, v = narrow(x[1:] for x in make(0))
    expected = packed_attention(q, k, v, jnp.asarray(SEGMENTS[1:]), 5)[:, -fed:]
    unwritten = jnp.full((1, 7, *k.shape[2:]), 1e4)
    caches = (jnp.concatenate([x, unwritten], 1) for x in (k, v))
    visible = slots_up_to(jnp.arange(18 - fed, 18)[None], 25)
    computed = cached_attention(q[:, -fed:], *caches, visible)
    assert harness.relative_error(computed, expected) < TOLERANCE


def test_the_tokens_of_a_block_all_see_each_other():
    # A block drafter's mask: context of 11 tokens, then 4 that see it and the whole block.
    q, k, v = narrow(x[1:] for x in make(0))
    visible = slots_up_to(jnp.full((1, 4), 14), 18)
    ours = cached_attention(q[:, 11:15], k, v, visible)
    q, k, v = (np.asarray(x[0], np.float64) for x in (q[:, 11:15], k[:, :15], v[:, :15]))
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))  # two query heads share a key head
    weights = np.exp(np.einsum("qnd,knd->qnk", q, k) * q.shape[-1] ** -0.5)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("qnk,knd->qnd", weights, v)
    assert harness.relative_error(ours[0], expected) < TOLERANCE


@pytest.mark.parametrize("scoring", [PLAIN, Scoring(window=5), Scoring(chunk=4)])
def test_the_order_of_cache_slots_changes_nothing(scoring):
    # The tokens lie anywhere in the cache; what is visible and where tokens stand are arguments.
    q, k, v = narrow(x[1:] for x in make(0))
    segments, positions = jnp.asarray(SEGMENTS[1:]), jnp.arange(18)[None]
    expected = packed_attention(q, k, v, segments, 5, scoring=scoring, positions=positions)
    slots = jnp.asarray(np.random.default_rng(4).permutation(25)[None, :18])
    cache = write_slots((jnp.full((1, 25, *k.shape[2:]), 1e4),) * 2, (k, v), slots)
    every_token = jnp.zeros((1, 18, 25), bool)
    visible = every_token.at[0, :, slots[0]].set(jnp.triu(jnp.ones((18, 18), bool)))
    computed = cached_attention(
        q,
        *cache,
        visible,
        scoring=scoring,
        positions=positions,
        slot_positions=jnp.zeros((1, 25), jnp.int32).at[0, slots[0]].set(positions[0]),
    )
    assert harness.relative_error(computed, expected) < TOLERANCE
