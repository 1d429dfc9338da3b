"""Gated DeltaNet: a recurrent state [dk, dv] per head in the place of keys and values.

Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464, as Qwen3-Next and Qwen3.5 use it (dk x dv state,
the transpose of the paper's). Token t, with decay a_t = exp(log_decay_t) and strength b_t:

    S_t = a_t S_{t-1} + k_t^T b_t (v_t - k_t a_t S_{t-1})        o_t = q_t S_t

Decoding computes this step. The forward pass over packed documents, of a frozen target, computes a
chunk of tokens at a time: the corrections u that a chunk writes, each of which depends on those
before it, solve one triangular system (section 3.3). A document starts with an empty state.

B batch, T sequence, Z chunks of Q tokens, N heads, dk and dv head sizes, W taps.
"""

import functools

import jax
import jax.numpy as jnp

from MaxDraft.layers.blocks import merge_length, split_length
from MaxDraft.layers.norms import rms_norm

# A state sums over thousands of tokens: accelerators must not round its products to bfloat16.
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def causal_conv(
    x: jax.Array,  # [B, T, conv_dim]
    weight: jax.Array,  # [W, conv_dim], the last row is the token's own
    segment_ids: jax.Array,  # int [B, T]
) -> jax.Array:  # [B, T, conv_dim] in x's dtype
    """silu(sum_w weight[w] x[t - (W - 1) + w]) over the tokens of t's own document."""
    length = x.shape[1]

    def earlier(y: jax.Array, by: int) -> jax.Array:
        return jnp.pad(y, ((0, 0), (by, 0), *[(0, 0)] * (y.ndim - 2)))[:, :length]

    total = jnp.zeros(x.shape, jnp.float32)
    for by, row in enumerate(weight.astype(jnp.float32)[::-1]):
        own = earlier(segment_ids, by) == segment_ids
        total += jnp.where(own[..., None], earlier(x, by).astype(jnp.float32) * row, 0)
    # Rounded before the activation, as a convolution in x's dtype followed by one would be.
    return jax.nn.silu(total.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


def gated_delta_rule(
    q: jax.Array,  # [B, T, N, dk]
    k: jax.Array,  # [B, T, N, dk]
    v: jax.Array,  # [B, T, N, dv]
    log_decay: jax.Array,  # float32 [B, T, N], at most 0
    beta: jax.Array,  # [B, T, N], in 0..1
    segment_ids: jax.Array,  # int [B, T]; the tokens of a document stand together
    chunk: int = 64,
) -> jax.Array:  # [B, T, N, dv] in v's dtype
    """The recurrence over packed documents, a chunk at a time; float32 inside.

    Memory grows with chunk * T; a chunk may hold any number of documents.
    """

    def chunks(x: jax.Array) -> jax.Array:
        """[B, T, N, ...] -> float32 [Z, B, N, Q, ...]"""
        return jnp.moveaxis(split_length(x.astype(jnp.float32), chunk), 3, 2)

    length, dtype = v.shape[1], v.dtype
    q, k = _normalize(q, k)
    q, k, v, log_decay, beta = (chunks(x) for x in (q, k, v, log_decay, beta))
    segments = split_length(segment_ids, chunk)  # [Z, B, Q]
    decay, carried = _decays(log_decay, segments)

    # Token i corrects what it reads at k_i of the old state S and of the corrections u_j before it:
    # u_i + sum_{j<i} beta_i decay_ij (k_i k_j) u_j = beta_i (v_i - carried_i k_i S).
    # The system is solved for both terms of the right side, of all chunks at once: S, which is not
    # known yet, is multiplied with the second solution in the scan below.
    system = _product("zbnid,zbnjd->zbnij", k, k) * decay * beta[..., None]
    sides = jnp.concatenate([v, carried[..., None] * k], -1) * beta[..., None]
    solved = jax.lax.linalg.triangular_solve(
        system, sides, left_side=True, lower=True, unit_diagonal=True
    )
    scores = _product("zbnid,zbnjd->zbnij", q, k) * decay
    reads = q * carried[..., None]
    writes = k * decay[..., -1, :, None]  # decayed to the end of the chunk

    def step(state: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        scores, reads, writes, solved, end_decay = xs
        of_values, of_state = jnp.split(solved, [state.shape[-1]], axis=-1)
        new = of_values - _product("bnik,bnkv->bniv", of_state, state)
        out = _product("bnik,bnkv->bniv", reads, state) + _product("bnij,bnjv->bniv", scores, new)
        state = end_decay[..., None, None] * state + _product("bnik,bniv->bnkv", writes, new)
        return state, out.astype(dtype)

    empty = jnp.zeros((*q.shape[1:3], q.shape[-1], v.shape[-1]), jnp.float32)
    _, out = jax.lax.scan(step, empty, (scores, reads, writes, solved, carried[..., -1]))
    return merge_length(jnp.moveaxis(out, 2, 3), length)


def _decays(
    log_decay: jax.Array,  # float32 [Z, B, N, Q]
    segments: jax.Array,  # int [Z, B, Q]
) -> tuple[jax.Array, jax.Array]:
    """-> decay [Z, B, N, Q, Q] from after token j to token i, carried [Z, B, N, Q] from the state
    that the chunk before left to token i; zero from one document to another.
    """
    lower = jnp.tri(segments.shape[-1])
    # The logarithms between j and i are summed themselves: the difference of two running sums would
    # have the rounding error of those sums, which are larger.
    between = _product("im,zbnm,mj->zbnij", lower, log_decay, jnp.tri(lower.shape[0], k=-1))
    visible = (segments[..., :, None] == segments[..., None, :]) & (lower > 0)  # [Z, B, Q, Q]
    decay = jnp.where(visible[:, :, None], jnp.exp(between), 0)
    # The first chunk is compared with the last by the roll; its state is empty, so that whatever
    # comes of the comparison does not matter.
    same_document = segments == jnp.roll(segments[..., -1:], 1, axis=0)
    carried = jnp.where(same_document[:, :, None], jnp.exp(jnp.cumsum(log_decay, -1)), 0)
    return decay, carried


def gated_delta_step(
    state: jax.Array,  # float32 [B, N, dk, dv]
    q: jax.Array,  # [B, N, dk]
    k: jax.Array,  # [B, N, dk]
    v: jax.Array,  # [B, N, dv]
    log_decay: jax.Array,  # float32 [B, N]
    beta: jax.Array,  # [B, N]
) -> tuple[jax.Array, jax.Array]:  # [B, N, dv] in v's dtype, new state
    """One token of the recurrence."""
    q, k = _normalize(q, k)
    state = jnp.exp(log_decay)[..., None, None] * state
    new = (v - _product("bnk,bnkv->bnv", k, state)) * beta[..., None]
    state = state + k[..., None] * new[..., None, :]
    return _product("bnk,bnkv->bnv", q, state).astype(v.dtype), state


def gated_norm(x: jax.Array, gate: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm(x) * weight * silu(gate): x, gate [..., dv], weight [dv] -> x's dtype."""
    normed = rms_norm(x, weight, eps).astype(jnp.float32)
    return (normed * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


def _normalize(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys of length one in float32, queries times dk^-1/2."""
    q, k = (x.astype(jnp.float32) for x in (q, k))
    q, k = (x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k
