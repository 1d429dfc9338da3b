"""Attention in blocks and over a cache equals a dense softmax, and so do its gradients."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxDraft.layers.attention import cached_attention, packed_attention

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
            seen = [j for j in range(i + 1) if segments[j] == segments[i]]
            keys = [k[j, m] for j in seen] + [own[m] for own in (own_k[i] if len(own_k) else [])]
            values = [v[j, m] for j in seen] + [own[m] for own in (own_v[i] if len(own_v) else [])]
            scores = np.exp(np.array([q[i, n] @ key for key in keys]) / np.sqrt(q.shape[-1]))
            out[i, n] = (scores / scores.sum()) @ np.array(values)
    return out


def dense(q, k, v, own_k=None, own_v=None):
    """All scores at once, for autodiff in float64: same heads order, keys beside own keys."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    scores = jnp.einsum("bind,bjnd->bnij", q, k) / np.sqrt(q.shape[-1])
    seen = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & np.tri(T, dtype=bool)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
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


def packed(block, q, k, v, *own):
    return packed_attention(q, k, v, jnp.asarray(SEGMENTS), block, *own)


def narrow(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize("own_keys", [0, 1, 3])
@pytest.mark.parametrize(("block", "num_kv_heads"), [(5, 2), (6, 1), (18, 4), (100, 2)])
def test_attention_equals_a_loop_over_queries_and_keys(own_keys, block, num_kv_heads):
    arrays = make(own_keys, num_kv_heads)
    expected = [
        one_row(*(x[b] for x in arrays[:3]), SEGMENTS[b], *(x[b] for x in arrays[3:]))
        for b in range(len(SEGMENTS))
    ]
    ours = packed(block, *narrow(arrays))
    assert harness.relative_error(ours, np.stack(expected)) < TOLERANCE


@pytest.mark.parametrize("own_keys", [0, 3])
def test_gradients_equal_dense_attention_in_float64(own_keys):
    arrays = make(own_keys)
    direction = np.random.default_rng(1).normal(size=arrays[0].shape)

    def gradients(attend, arrays, direction):
        def total(*arrays):
            return (attend(*arrays) * direction).sum()

        return jax.jit(jax.grad(total, tuple(range(len(arrays)))))(*arrays)

    with jax.enable_x64(True):
        expected = gradients(dense, [jnp.asarray(x) for x in arrays], direction)
        assert expected[0].dtype == jnp.float64
        expected = [np.asarray(x) for x in expected]
    ours = gradients(functools.partial(packed, 5), narrow(arrays), jnp.float32(direction))
    for mine, theirs in zip(ours, expected, strict=True):
        assert harness.relative_error(mine, theirs) < TOLERANCE


def test_scores_that_overflow_an_unshifted_softmax_stay_finite():
    q, k, v = make(0)
    ours = packed(5, *narrow([100 * q, 100 * k, v]))
    assert np.isfinite(ours).all()


def test_scores_of_half_precision_inputs_are_kept_in_float32():
    # Scores 64 and 64.25 are one number in bfloat16, which would weigh both keys alike.
    q = jnp.asarray([[1, 1, 0, 0], [1, 1, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    k = jnp.asarray([[128, 0, 0, 0], [128, 0.5, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.asarray([[0, 0, 0, 0], [1, 1, 1, 1]], jnp.bfloat16).reshape(1, 2, 1, 4)
    expected = 1 / (1 + np.exp(-0.25))
    for out in (
        packed_attention(q, k, v, jnp.ones((1, 2), jnp.int32), 2),
        cached_attention(q, k, v, jnp.arange(2)[None]),
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
    slots = jnp.arange(18 - fed, 18)[None]
    ours = cached_attention(q[:, -fed:], *caches, slots)
    assert harness.relative_error(ours, expected) < TOLERANCE
