"""How tokens see each other: softmax attention, multi-head latent attention, gated delta rule.

A mixer makes queries, keys and values from the normalized state h [B, T, H] and gives them to a
context, which knows what each token may see: PackedContext for packed documents in training, the
cache of decoding/target_model.py. What comes back is projected to [B, T, H].

B batch, T sequence, H hidden size, N heads, M key/value heads, d head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from MaxDraft.layers.attention import packed_attention
from MaxDraft.layers.attention_keys import Scoring
from MaxDraft.layers.delta_net import causal_conv, gated_delta_rule, gated_norm
from MaxDraft.layers.mlp import linear
from MaxDraft.layers.norms import rms_norm
from MaxDraft.layers.params import Tree
from MaxDraft.layers.rope import Rope, rotate
from MaxDraft.sharding import constrain
from MaxDraft.targets.dims import MLA, Attention, DeltaNet

Rotary = dict[Rope, tuple[jax.Array, jax.Array]]  # cos and sin [B, T, d/2] of every embedding


class Context(Protocol):
    """What the tokens of a batch may see."""

    positions: jax.Array  # int [B, T], of the rotary embedding

    def attend(self, q, k, v, scoring: Scoring, sinks, cache) -> tuple[jax.Array, Any]:
        """q [B, T, N, d], k [B, T, M, d], v [B, T, M, dv] -> [B, T, N, dv], new cache."""

    def recur(self, x, conv, log_decay, beta, dims: DeltaNet, cache) -> tuple[jax.Array, Any]:
        """x [B, T, conv_dim] to be convolved, decays [B, T, N] -> [B, T, N, dv], new cache."""


@dataclasses.dataclass(frozen=True)
class PackedContext:
    """Documents packed into rows: a token sees what stands before it in its document."""

    positions: jax.Array  # int [B, T]
    segment_ids: jax.Array  # int [B, T]
    block: int  # queries attended at a time
    kernel: str = "xla"  # one of attention.IMPLEMENTATIONS

    def attend(self, q, k, v, scoring, sinks, cache):
        out = packed_attention(
            q,
            k,
            v,
            self.segment_ids,
            self.block,
            scoring=scoring,
            positions=self.positions,
            sinks=sinks,
            kernel=self.kernel,
        )
        return out, cache

    def recur(self, x, conv, log_decay, beta, dims, cache):
        q, k, v = split_heads(causal_conv(x, conv, self.segment_ids), dims)
        return gated_delta_rule(q, k, v, log_decay, beta, self.segment_ids), cache


def attention(
    h: jax.Array, w: Tree, a: Attention, eps: float, offset: float, rotary: Rotary,
    context: Context, cache: Any,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Softmax attention (GQA), its switches in the order in which they act -> [B, T, H], cache."""

    def project(name: str, count: int) -> jax.Array:
        y = linear(h, w[name], w.get(name + "_bias"))
        if a.qk_norm == "all_heads" and name != "v":
            y = rms_norm(y, w[name + "_norm"], eps, offset)
        y = y.reshape(*h.shape[:2], count, -1)
        axis = "target_heads" if name == "q" else "target_kv_heads"
        return constrain(y, "target_batch", None, axis, None)

    def normed_and_rotated(name: str, y: jax.Array) -> jax.Array:
        if a.qk_norm == "head":
            y = rms_norm(y, w[name + "_norm"], eps, offset)
        if a.rope:
            y = rotate(y, *rotary[a.rope], a.rope.interleaved)
        return rms_norm(y, None, eps) if a.l2_norm else y

    q, gate = project("q", a.num_heads), None
    if a.gated:
        q, gate = jnp.split(q, 2, axis=-1)
    q = normed_and_rotated("q", q)
    k = normed_and_rotated("k", project("k", a.num_kv_heads))
    if a.attn_temperature_tuning:
        floor, scale = a.attn_temperature_tuning
        growth = jnp.log1p(jnp.floor((context.positions + 1.0) / floor)) * scale + 1.0
        q = (q * growth[..., None, None]).astype(q.dtype)
    scoring = Scoring(a.scale, a.softcap, a.window, a.chunk)
    out, cache = context.attend(q, k, project("v", a.num_kv_heads), scoring, w.get("sinks"), cache)
    if gate is not None:
        out = out * jax.nn.sigmoid(gate)
    return linear(out.reshape(*h.shape[:2], -1), w["o"], w.get("o_bias")), cache


def mla(
    h: jax.Array, w: Tree, a: MLA, rotary: Rotary, context: Context, cache: Any
) -> tuple[jax.Array, Any]:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    q = [q_nope, rope(q_rope)]               from W_qb norm(W_qa h), or from W_q h
    k = [k_nope, rope(k_rope) for all heads]  k_nope, v from W_kvb norm(c), [c, k_rope] = W_kva h
    """

    def rotated(x: jax.Array) -> jax.Array:
        return rotate(x, *rotary[a.rope], a.rope.interleaved)

    def heads(x: jax.Array) -> jax.Array:
        x = x.reshape(*h.shape[:2], a.num_heads, -1)
        return constrain(x, "target_batch", None, "target_heads", None)

    if a.q_lora_rank:
        compressed = rms_norm(linear(h, w["q_a"], w.get("q_a_bias")), w["q_a_norm"], a.norm_eps)
        q = heads(linear(compressed, w["q_b"]))
    else:
        q = heads(linear(h, w["q"]))
    q = jnp.concatenate([q[..., : a.qk_nope_head_dim], rotated(q[..., a.qk_nope_head_dim :])], -1)

    compressed = linear(h, w["kv_a"], w.get("kv_a_bias"))
    k_rope = rotated(compressed[..., None, a.kv_lora_rank :])
    kv = heads(
        linear(rms_norm(compressed[..., : a.kv_lora_rank], w["kv_a_norm"], a.norm_eps), w["kv_b"])
    )
    k_nope, v = kv[..., : a.qk_nope_head_dim], kv[..., a.qk_nope_head_dim :]
    k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], a.qk_rope_head_dim))
    k = jnp.concatenate([k_nope, k_rope], -1)

    out, cache = context.attend(q, k, v, Scoring(a.scale), None, cache)
    return linear(out.reshape(*h.shape[:2], -1), w["o"], w.get("o_bias")), cache


def delta_net(
    h: jax.Array, w: Tree, a: DeltaNet, eps: float, context: Context, cache: Any
) -> tuple[jax.Array, Any]:
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464) as Qwen3-Next computes it."""
    B, T, _ = h.shape
    if a.fused:  # the tensors hold everything that belongs to one key head together
        group = linear(h, w["qkvz"]).reshape(B, T, a.num_k_heads, -1)
        values = a.num_v_heads // a.num_k_heads * a.v_dim
        cuts = [a.k_dim, 2 * a.k_dim, 2 * a.k_dim + values]
        *qkv, z = (part.reshape(B, T, -1) for part in jnp.split(group, cuts, axis=-1))
        x = jnp.concatenate(qkv, -1)
        pair = linear(h, w["ba"]).reshape(B, T, a.num_k_heads, -1)
        b, decay = (part.reshape(B, T, -1) for part in jnp.split(pair, 2, axis=-1))
    else:
        x, z = linear(h, w["qkv"]), linear(h, w["z"])
        b, decay = linear(h, w["b"]), linear(h, w["a"])
    log_decay = -jnp.exp(w["A_log"]) * jax.nn.softplus(decay.astype(jnp.float32) + w["dt_bias"])
    out, cache = context.recur(x, w["conv"], log_decay, jax.nn.sigmoid(b), a, cache)
    out = gated_norm(out, z.reshape(out.shape), w["delta_norm"], eps)
    return linear(out.reshape(B, T, -1), w["delta_o"]), cache


def split_heads(x: jax.Array, a: DeltaNet) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Convolved [..., conv_dim] -> q, k [..., Nv, dk], v [..., Nv, dv]; key heads repeated."""
    k_size = a.num_k_heads * a.k_dim
    q, k, v = jnp.split(x, [k_size, 2 * k_size], axis=-1)

    def key_heads(y: jax.Array) -> jax.Array:
        y = y.reshape(*y.shape[:-1], a.num_k_heads, a.k_dim)
        return jnp.repeat(y, a.num_v_heads // a.num_k_heads, axis=-2)

    return key_heads(q), key_heads(k), v.reshape(*v.shape[:-1], a.num_v_heads, a.v_dim)
