"""Plain decoding of the target with a KV cache: the yardstick of speculative decoding.

B prompts, P prompt length (right-padded), S tokens fed at once, C cache slots. Slot s of a cache
belongs to position s; a slot is always written before a query may see it, so pads never matter.
Sampling divides logits by the temperature; temperature 0 is the argmax.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft.layers.attention import cached_attention
from MaxDraft.layers.params import Tree
from MaxDraft.targets import decoder
from MaxDraft.targets.decoder import DecoderDims


@dataclasses.dataclass(frozen=True)
class TargetModel:
    """What decoding must know of a target; hashable, so that it can be closed over by jit."""

    dims: DecoderDims
    capture: tuple[int, ...]
    dtype: Any

    def empty_cache(self, batch: int, slots: int) -> Any:
        """Zeros: per group of layers, keys and values [layers, B, C, M, d]."""
        shape = (batch, slots, self.dims.num_kv_heads, self.dims.head_dim)
        return tuple(
            tuple(jnp.zeros((len(layers), *shape), self.dtype) for _ in ("keys", "values"))
            for layers in decoder.layer_groups(self.capture, self.dims.num_layers)
        )

    def extend(
        self,
        params: Tree,
        cache: Any,
        tokens: jax.Array,  # int [B, S]
        slots: jax.Array,  # int [B, S]
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Feeds tokens -> features [B, S, 3H], final state [B, S, H], cache."""

        def attend(q, k, v, layer_cache):
            keys, values = write(layer_cache, (k, v), slots)
            return cached_attention(q, keys, values, slots), (keys, values)

        embeddings = decoder.embed(params, tokens, self.dtype)
        return decoder.run_layers(params, embeddings, slots, self.dims, self.capture, attend, cache)


def write(
    cache: tuple[jax.Array, jax.Array],  # keys and values [B, C, M, d]
    new: tuple[jax.Array, jax.Array],  # [B, S, M, d]
    slots: jax.Array,  # int [B, S]
) -> tuple[jax.Array, jax.Array]:
    """Cache with the new keys and values in their slots."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return tuple(old.at[rows, slots].set(x) for old, x in zip(cache, new, strict=True))


def at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, S, ...], index int [B] -> [B, ...]."""
    return x[jnp.arange(x.shape[0]), index]


def probabilities(logits: jax.Array, temperature: float) -> jax.Array:
    """Distribution that is sampled from: softmax(logits / temperature), float32 [..., V]."""
    return jax.nn.softmax(logits / temperature)


def choose(key: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """logits [B, V] -> tokens int32 [B]: the argmax at temperature 0, else a sample."""
    if temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reply:
    """Generated text of B prompts, and what it cost."""

    tokens: jax.Array  # int32 [B, max_new_tokens]
    length: jax.Array  # int32 [B], the end-of-turn token included
    verify_steps: jax.Array  # int32 [B]: forward passes of the target after the prompt
    accepted: jax.Array  # int32 [B, N]: how often the draft of chain step j was accepted


def is_stop(tokens: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    """bool like tokens: whether the token ends a reply."""
    return jnp.isin(tokens, jnp.asarray(stop_ids, jnp.int32))


def decode_plain(
    model: TargetModel,
    params: Tree,
    prompt: jax.Array,  # int32 [B, P]
    prompt_length: jax.Array,  # int32 [B]
    key: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float,
) -> Reply:
    """One token for each forward pass of the target."""
    batch, width = prompt.shape
    slots = jnp.broadcast_to(jnp.arange(width), prompt.shape)
    cache = model.empty_cache(batch, width + max_new_tokens)
    _, last, cache = model.extend(params, cache, prompt, slots)
    first = choose(
        jax.random.fold_in(key, 0),
        decoder.logits(params, at(last, prompt_length - 1)),
        temperature,
    )
    out = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        return carry[-1].any()

    def body(carry):
        cache, out, length, active = carry
        token = at(out, length - 1)
        _, last, cache = model.extend(
            params, cache, token[:, None], (prompt_length + length - 1)[:, None]
        )
        token = choose(
            jax.random.fold_in(key, length.max()), decoder.logits(params, last[:, 0]), temperature
        )
        where = jnp.where(active, length, max_new_tokens)  # out of range: dropped
        out = out.at[jnp.arange(batch), where].set(token, mode="drop")
        length = length + active
        active &= ~is_stop(token, stop_ids) & (length < max_new_tokens)
        return cache, out, length, active

    length = jnp.ones(batch, jnp.int32)
    active = ~is_stop(first, stop_ids) & (length < max_new_tokens)
    _, out, length, _ = jax.lax.while_loop(unfinished, body, (cache, out, length, active))
    return Reply(out, length, length - 1, jnp.zeros((batch, 0), jnp.int32))
