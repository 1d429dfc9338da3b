"""Attention: blockwise for training, over a cache for decoding.

B batch, R queries, T keys, N query heads, M key/value heads (GQA), G = N / M, d head size; over a
cache S queries and `slots` keys.

Documents lie packed one after the other, so the keys that a query sees are an interval,
[first, last]: from the start of its document, of its window or of its chunk, up to itself. Every
mask is therefore two numbers a query, and a block of keys that no query of a block sees is not
computed at all.

    out = softmax(q k^T) v        logsumexp = log sum exp(q k^T)

The softmax is an online one, as in FlashAttention (Milakov & Gimelshein 2018; Dao et al. 2022): the
forward and the backward pass go over blocks of keys (attention_xla.py has the equations), so that
memory grows with T, never with T * T. `logsumexp`, which has a gradient too, is what
`merge_own_keys` needs to put further keys under the same softmax.
"""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from MaxDraft.layers import attention_xla
from MaxDraft.layers.attention_keys import MASKED, PLAIN, KeyValueBlocks, Scoring
from MaxDraft.layers.experimental import attention_gpu, attention_tpu
from MaxDraft.layers.norms import soft_cap
from MaxDraft.sharding import active_rules, num_shards, partition_spec

# Modules with a `forward` and a `backward`, by the name that a configuration resolves to.
IMPLEMENTATIONS = {"xla": attention_xla, "tpu": attention_tpu, "gpu": attention_gpu}


# ------------------------------------------------------------------------------- packed documents
def document_starts(segment_ids: jax.Array) -> jax.Array:
    """int [B, T] -> int32 [B, T], where the document of every token begins in its row."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    begins = jnp.where(segment_ids != before, index, 0)
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
    kernel: str = "xla",  # of IMPLEMENTATIONS
) -> jax.Array:  # [B, T, N, dv]
    """Causal attention inside each document; softmax in float32.

    Under axis rules each device attends with its own heads and batch rows inside a shard_map: which
    blocks of keys it goes over is then its own affair, and no device waits for another inside the
    loop.
    """
    active, head_shards, kv_heads = active_rules(), num_shards("target_heads"), k.shape[2]
    attend = functools.partial(_packed_attention, block=block, scoring=scoring)
    if active is None:
        return attend(q, k, v, segment_ids, positions, sinks, kernel=kernel)
    if q.shape[2] % head_shards or max(head_shards, kv_heads) % min(head_shards, kv_heads):
        if kernel != "xla":
            warnings.warn(
                f"{q.shape[2]} query heads and {kv_heads} key/value heads cannot be split over "
                f"{head_shards} devices: the target's attention is computed by XLA, which "
                f"partitions it as it can",
                stacklevel=2,
            )
        return attend(q, k, v, segment_ids, positions, sinks, kernel="xla")
    if kv_heads < head_shards:  # every device needs the one key head that its query heads share
        k, v = (jnp.repeat(x, head_shards // kv_heads, axis=2) for x in (k, v))
    mesh, rules = active

    def spec(*axes: str | None) -> PartitionSpec:
        return partition_spec(axes, rules)

    heads, tokens = spec("target_batch", None, "target_heads", None), spec("target_batch", None)
    arrays = [q, k, v, segment_ids, positions, sinks]
    specs = [heads, heads, heads, tokens, tokens, spec("target_heads")]
    run = jax.shard_map(
        functools.partial(attend, kernel=kernel),
        mesh=mesh,
        in_specs=tuple(None if x is None else spec for x, spec in zip(arrays, specs, strict=True)),
        out_specs=heads,
        check_vma=False,
    )
    return run(*arrays)


def _packed_attention(
    q, k, v, segment_ids, positions, sinks, block: int, scoring: Scoring, kernel: str
):
    last = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), segment_ids.shape)
    first = document_starts(segment_ids)
    if scoring.window:
        first = jnp.maximum(first, last - scoring.window + 1)
    if scoring.chunk:
        first = jnp.maximum(first, last - positions % scoring.chunk)
    out, logsumexp = _self_attention(q, k, v, first, last, block, scoring, kernel)
    if sinks is not None:
        share = jax.nn.sigmoid(logsumexp - sinks.astype(jnp.float32))
        out = out * share[..., None].astype(out.dtype)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _self_attention(q, k, v, first, last, block: int, scoring: Scoring, kernel: str):
    """-> out [B, T, N, dv], logsumexp float32 [B, T, N]; with gradients to q, k and v."""
    keys = KeyValueBlocks.from_arrays(k, v, block, kernel=kernel)
    return IMPLEMENTATIONS[kernel].forward(q, keys, first, last, scoring)


def _self_attention_forward(q, k, v, first, last, block, scoring, kernel):
    out = _self_attention(q, k, v, first, last, block, scoring, kernel)
    return out, (q, k, v, first, last, *out)


def _self_attention_backward(block, scoring, kernel, residuals, cotangents):
    q, k, v, *rest = residuals
    keys = KeyValueBlocks.from_arrays(k, v, block, kernel=kernel)
    d_q, d_keys = IMPLEMENTATIONS[kernel].backward(
        q, keys, *rest, *cotangents, keys.zeros(), scoring
    )
    d_k, d_v = d_keys.arrays(k.shape[1])
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_self_attention.defvjp(_self_attention_forward, _self_attention_backward)


# ------------------------------------------------------------------------------------ any queries
@jax.custom_vjp
def interval_attention(
    q: jax.Array,  # [B, R, N, d]
    keys: KeyValueBlocks,
    d_keys: KeyValueBlocks | None,  # float32; None: no gradients are wanted
    first: jax.Array,  # int [B, R] a query sees the keys from this one
    last: jax.Array,  # int [B, R] to this one, itself included; below `first`: none
) -> tuple[jax.Array, jax.Array, KeyValueBlocks | None]:
    """-> out [B, R, N, dv], logsumexp float32 [B, R, N], d_keys unchanged.

    Many calls read the same keys. So that each adds its part to their gradient in place, and none
    makes a gradient of all keys of its own, that gradient is handed from call to call: the forward
    pass returns `d_keys` as it is, and in the backward pass its cotangent is the sum so far.
    """
    return *IMPLEMENTATIONS[keys.kernel].forward(q, keys, first, last, PLAIN), d_keys


def _interval_attention_forward(q, keys, d_keys, first, last):
    out, logsumexp = IMPLEMENTATIONS[keys.kernel].forward(q, keys, first, last, PLAIN)
    return (out, logsumexp, d_keys), (q, keys, first, last, out, logsumexp)


def _interval_attention_backward(residuals, cotangents):
    q, keys, *rest = residuals
    d_out, d_logsumexp, sum_so_far = cotangents
    d_q, d_keys = IMPLEMENTATIONS[keys.kernel].backward(
        q, keys, *rest, d_out, d_logsumexp, sum_so_far, PLAIN
    )
    return d_q, None, d_keys, None, None


interval_attention.defvjp(_interval_attention_forward, _interval_attention_backward)


def merge_own_keys(
    out: jax.Array,  # [..., N, d] of interval_attention
    logsumexp: jax.Array,  # float32 [..., N]
    q: jax.Array,  # [..., N, d]
    own_k: jax.Array,  # [J, ..., M, d] keys that only this query sees
    own_v: jax.Array,  # [J, ..., M, d]
) -> jax.Array:  # [..., N, d]
    """Attention over an interval of keys and a query's own keys, under one softmax."""
    grouped = q.reshape(*q.shape[:-2], own_k.shape[-2], -1, q.shape[-1])
    scores = jnp.einsum("...mgd,j...md->...mgj", grouped, own_k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    logsumexp = logsumexp.reshape(scores.shape[:-1])
    total = jnp.logaddexp(logsumexp, jax.nn.logsumexp(scores, -1))
    interval_share = jnp.exp(logsumexp - total)[..., None].astype(out.dtype)
    own_weights = jnp.exp(scores - total[..., None]).astype(out.dtype)
    merged = interval_share * out.reshape(grouped.shape) + jnp.einsum(
        "...mgj,j...md->...mgd", own_weights, own_v
    )
    return merged.reshape(q.shape)


# ----------------------------------------------------------------------------------- over a cache
def cached_attention(
    q: jax.Array,  # [B, S, N, d]
    k_cache: jax.Array,  # [B, slots, M, d]
    v_cache: jax.Array,  # [B, slots, M, dv]
    visible: jax.Array,  # bool [B, S, slots] the cache slots that each query sees, its own included
    *,
    scoring: Scoring = PLAIN,
    positions: jax.Array | None = None,  # int [B, S] of the queries; needed for windows and chunks
    slot_positions: jax.Array | None = None,  # int [B, slots] of the tokens in the slots; likewise
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:  # [B, S, N, dv]
    """Attention over a KV cache; softmax in float32.

    A slot is a place in memory and says nothing about the order of the tokens: what a query sees
    is given by `visible`, and how far away it is by the positions. So a chain, the branches of a
    tree and a block whose tokens all see each other are served alike.
    """
    grouped = q.reshape(*q.shape[:2], k_cache.shape[2], -1, q.shape[-1])
    scores = _scores("bqmgd,bkmd->bmgqk", grouped, k_cache, scoring)
    if scoring.window or scoring.chunk:
        queries, keys = positions[:, :, None], slot_positions[:, None]
        if scoring.window:
            visible &= queries - keys < scoring.window
        if scoring.chunk:
            visible &= queries // scoring.chunk == keys // scoring.chunk
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = _softmax(scores, sinks).astype(v_cache.dtype)
    out = jnp.einsum("bmgqk,bkmd->bqmgd", weights, v_cache)
    return out.reshape(*q.shape[:-1], v_cache.shape[-1])


def write_slots(
    cache: tuple[jax.Array, ...],  # each [B, slots, ...]
    new: tuple[jax.Array, ...],  # each [B, S, ...]
    slots: jax.Array,  # int [B, S]
) -> tuple[jax.Array, ...]:
    """The cache with the new tokens' keys and values, or whatever belongs to a token, written."""
    # Under vmap the batch is a batching dimension of the scatter, so that a mesh that splits the
    # batch updates every device's own part of the cache.
    write = jax.vmap(lambda old, x, row: old.at[row].set(x.astype(old.dtype)))
    return tuple(write(old, x, slots) for old, x in zip(cache, new, strict=True))


def read_slots(x: jax.Array, slots: jax.Array) -> jax.Array:
    """x [B, slots, ...], slots int [B] or [B, S] -> what stands there, [B, ...] or [B, S, ...]."""
    return jax.vmap(lambda row, index: row[index])(x, slots)


def slots_up_to(last: jax.Array, num_slots: int) -> jax.Array:
    """int [...] -> bool [..., slots]: the slots 0 to `last`, where a cache holds text in order."""
    return jnp.arange(num_slots) <= last[..., None]


def _scores(equation: str, q: jax.Array, k: jax.Array, scoring: Scoring) -> jax.Array:
    """q k * scale in float32, capped."""
    scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    return soft_cap(scores * scale, scoring.softcap)


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Softmax of float32 [B, M, G, S, slots] over the last axis; sinks [N] add their share."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)
    column = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, column], -1), axis=-1)[..., :-1]
