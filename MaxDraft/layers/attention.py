"""Attention: in blocks for training, over a cache for decoding.

B batch, R rows (queries), T keys, N heads, M key/value heads, G = N / M, d head size.

What a row sees is an interval of keys, [first, last], since documents lie packed one after the
other: from the start of its document, of its window or of its chunk, up to itself. So every mask is
two numbers a row, and a block of keys that no row of a block sees is not computed at all.

    out = softmax(q k^T) v        log_sum = log sum exp(q k^T)

Forward and backward walk over blocks of keys (attention_xla.py, or the kernels of attention_tpu.py
and attention_gpu.py): memory grows with T, never with T * T. `log_sum` joins what a row sees
elsewhere under the same softmax (`joined`), and has its gradient.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from MaxDraft.layers import attention_xla
from MaxDraft.layers.attention_keys import MASKED, PLAIN, Keys, Scoring
from MaxDraft.layers.experimental import attention_gpu, attention_tpu
from MaxDraft.layers.norms import soft_cap
from MaxDraft.sharding import active_rules, partition_spec, ways


# ------------------------------------------------------------------------------- packed documents
def document_starts(segment_ids: jax.Array) -> jax.Array:
    """int [B, T] -> int32 [B, T], where the document of every token begins in its row."""
    rows = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    begins = jnp.where(segment_ids != before, rows, 0)
    return jax.lax.cummax(begins, axis=1)


def packed_attention(
    q: jax.Array,  # [B, T, N, d]
    k: jax.Array,  # [B, T, M, d]
    v: jax.Array,  # [B, T, M, dv]
    segment_ids: jax.Array,  # [B, T] documents packed into the row, each in one piece
    block: int,
    *,
    scoring: Scoring = PLAIN,
    positions: jax.Array | None = None,  # int [B, T] inside each document; needed for chunks
    sinks: jax.Array | None = None,  # [N] scores that take a share of the softmax and give nothing
    kernel: str = "xla",  # one of KERNELS
) -> jax.Array:  # [B, T, N, dv]
    """Causal attention inside each document; softmax in float32.

    Under axis rules each device attends with its own heads and batch rows: which blocks of keys are
    walked over is then its own affair, and no device waits for another inside the walk.
    """
    active, shares, kv_heads = active_rules(), ways("target_heads"), k.shape[2]
    attend = functools.partial(_packed_attention, block=block, scoring=scoring)
    given = [q, k, v, segment_ids, positions, sinks]
    if active is None:
        return attend(*given, kernel=kernel)
    if q.shape[2] % shares or max(shares, kv_heads) % min(shares, kv_heads):
        if kernel != "xla":
            warnings.warn(
                f"{q.shape[2]} heads over {kv_heads} of keys do not divide over {shares} devices: "
                f"the target attends by XLA, which splits as it can",
                stacklevel=2,
            )
        return attend(*given, kernel="xla")
    if kv_heads < shares:  # every device needs the one key head that its query heads share
        k, v = (jnp.repeat(x, shares // kv_heads, axis=2) for x in (k, v))
    mesh, rules = active

    def spec(*axes: str | None) -> PartitionSpec:
        return partition_spec(axes, rules)

    heads, tokens = spec("target_batch", None, "target_heads", None), spec("target_batch", None)
    given[1:3] = k, v
    specs = [heads, heads, heads, tokens, tokens, spec("target_heads")]
    run = jax.shard_map(
        functools.partial(attend, kernel=kernel),
        mesh=mesh,
        in_specs=tuple(None if x is None else spec for x, spec in zip(given, specs, strict=True)),
        out_specs=heads,
        check_vma=False,
    )
    return run(*given)


def _packed_attention(
    q, k, v, segment_ids, positions, sinks, block: int, scoring: Scoring, kernel: str
):
    rows = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), segment_ids.shape)
    first = document_starts(segment_ids)
    if scoring.window:
        first = jnp.maximum(first, rows - scoring.window + 1)
    if scoring.chunk:
        first = jnp.maximum(first, rows - positions % scoring.chunk)
    out, log_sum = _whole_attention(q, k, v, first, rows, block, scoring, kernel)
    if sinks is not None:
        share = jax.nn.sigmoid(log_sum - sinks.astype(jnp.float32))
        out = out * share[..., None].astype(out.dtype)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _whole_attention(q, k, v, first, last, block: int, scoring: Scoring, kernel: str):
    """-> out [B, T, N, dv], log_sum float32 [B, T, N]; with gradients to q, k and v."""
    keys = Keys.of(k, v, block, kernel=kernel)
    return _walks(keys).forward(q, keys, first, last, scoring)


def _whole_attention_forward(q, k, v, first, last, block, scoring, kernel):
    out = _whole_attention(q, k, v, first, last, block, scoring, kernel)
    return out, (q, k, v, first, last, *out)


def _whole_attention_backward(block, scoring, kernel, kept, cotangents):
    q, k, v, *rest = kept
    keys = Keys.of(k, v, block, kernel=kernel)
    d_q, gradients = _walks(keys).backward(q, keys, *rest, *cotangents, keys.zeros(), scoring)
    d_k, d_v = gradients.arrays(k.shape[1])
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_whole_attention.defvjp(_whole_attention_forward, _whole_attention_backward)


# ------------------------------------------------------------------------------------ any rows
@jax.custom_vjp
def row_attention(
    q: jax.Array,  # [B, R, N, d]
    keys: Keys,
    gradients: Keys | None,  # float32; None: no gradients are wanted
    first: jax.Array,  # int [B, R] the keys that a row sees: from this one
    last: jax.Array,  # int [B, R] to this one, itself included; below `first`: none
) -> tuple[jax.Array, jax.Array, Keys | None]:
    """-> out [B, R, N, d], log_sum float32 [B, R, N], gradients as they came.

    Many calls read the same keys. So that each adds to the gradient of all of them in place, and
    none makes an array of it, the keys' gradient is handed from call to call: forward,
    `gradients` only passes through; in the backward pass its cotangent is the sum so far.
    """
    return *_walks(keys).forward(q, keys, first, last, PLAIN), gradients


def _row_attention_forward(q, keys, gradients, first, last):
    out, log_sum = _walks(keys).forward(q, keys, first, last, PLAIN)
    return (out, log_sum, gradients), (q, keys, first, last, out, log_sum)


def _row_attention_backward(kept, cotangents):
    *d_out, so_far = cotangents
    d_q, gradients = _walks(kept[1]).backward(*kept, *d_out, so_far, PLAIN)
    return d_q, None, gradients, None, None


row_attention.defvjp(_row_attention_forward, _row_attention_backward)


def _walks(keys: Keys) -> ModuleType:
    if keys.kernel == "xla":
        return attention_xla
    return attention_tpu if keys.kernel.startswith("tpu") else attention_gpu


def joined(
    out: jax.Array,  # [..., N, d] of row_attention
    log_sum: jax.Array,  # float32 [..., N]
    q: jax.Array,  # [..., N, d]
    own_k: jax.Array,  # [J, ..., M, d] keys that only this row sees
    own_v: jax.Array,  # [J, ..., M, d]
) -> jax.Array:  # [..., N, d]
    """The same softmax over a row's own keys besides."""
    grouped = q.reshape(*q.shape[:-2], own_k.shape[-2], -1, q.shape[-1])
    scores = jnp.einsum("...mgd,j...md->...mgj", grouped, own_k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    log_sum = log_sum.reshape(scores.shape[:-1])
    total = jnp.logaddexp(log_sum, jax.nn.logsumexp(scores, -1))
    theirs = jnp.exp(log_sum - total)[..., None].astype(out.dtype)
    own = jnp.exp(scores - total[..., None]).astype(out.dtype)
    joint = theirs * out.reshape(grouped.shape) + jnp.einsum("...mgj,j...md->...mgd", own, own_v)
    return joint.reshape(q.shape)


# ----------------------------------------------------------------------------------- over a cache
def cached_attention(
    q: jax.Array,  # [B, S, N, d]
    k_cache: jax.Array,  # [B, C, M, d]
    v_cache: jax.Array,  # [B, C, M, d]
    slots: jax.Array,  # [B, S] the cache slot of each query; it sees all slots up to its own
    *,
    scoring: Scoring = PLAIN,
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:  # [B, S, N, d of v]
    """Attention over a KV cache whose slot s holds the token at position s."""
    grouped = q.reshape(*q.shape[:2], k_cache.shape[2], -1, q.shape[-1])
    scores = _scores("bqmgd,bkmd->bmgqk", grouped, k_cache, scoring)
    keys = jnp.arange(k_cache.shape[1])
    behind = slots[:, :, None] - keys
    visible = behind >= 0
    if scoring.window:
        visible &= behind < scoring.window
    if scoring.chunk:
        visible &= slots[:, :, None] // scoring.chunk == keys // scoring.chunk
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = _softmax(scores, sinks).astype(v_cache.dtype)
    out = jnp.einsum("bmgqk,bkmd->bqmgd", weights, v_cache)
    return out.reshape(*q.shape[:-1], v_cache.shape[-1])


def _scores(equation: str, q: jax.Array, k: jax.Array, scoring: Scoring) -> jax.Array:
    """q k * scale in float32, capped."""
    scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    return soft_cap(scores * scale, scoring.softcap)


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Softmax of float32 [B, M, G, Q, K] over the last axis, to which sinks [N] add their share."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)
    column = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, column], -1), axis=-1)[..., :-1]
