"""Plain decoding of the target with a cache: the yardstick of speculative decoding.

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
from MaxDraft.layers.delta_net import causal_conv, gated_delta_step
from MaxDraft.layers.params import Tree
from MaxDraft.targets import decoder
from MaxDraft.targets.dims import MLA, Attention, DecoderDims, DeltaNet
from MaxDraft.targets.mixers import split_heads
from MaxDraft.targets.plan import runs


@dataclasses.dataclass(frozen=True)
class TargetModel:
    """What decoding must know of a target; hashable, so that it can be closed over by jit."""

    dims: DecoderDims
    capture: tuple[int, ...]
    dtype: Any

    def empty_cache(self, batch: int, slots: int) -> Any:
        """Zeros: per run and place of its unit what the layer keeps, stacked over the repeats."""

        def of_layer(mixer: Attention | MLA | DeltaNet, repeats: int) -> Any:
            shapes = _cache_shapes(mixer, self.dtype, batch, slots)
            return {
                name: jnp.zeros((repeats, *shape), dtype) for name, (shape, dtype) in shapes.items()
            }

        return tuple(
            tuple(of_layer(layer.mixer, run.repeats) for layer in run.unit)
            for run in runs(self.dims.layers, self.capture)
        )

    def extend(
        self,
        params: Tree,
        cache: Any,
        tokens: jax.Array,  # int [B, S]
        slots: jax.Array,  # int [B, S]
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Feeds tokens -> features [B, S, 3H], final state [B, S, H], cache."""
        embeddings = decoder.embed(params, tokens, self.dtype)
        context = CachedContext(slots)
        return decoder.run_layers(params, embeddings, self.dims, self.capture, context, cache)


def _cache_shapes(
    mixer: Attention | MLA | DeltaNet, dtype: Any, B: int, C: int
) -> dict[str, tuple[tuple[int, ...], Any]]:
    match mixer:
        case Attention():
            shape = (B, C, mixer.num_kv_heads, mixer.head_dim)
            return {"keys": (shape, dtype), "values": (shape, dtype)}
        case MLA():
            heads = (B, C, mixer.num_heads)
            size = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim
            return {"keys": ((*heads, size), dtype), "values": ((*heads, mixer.v_dim), dtype)}
        case DeltaNet():
            channels = 2 * mixer.num_k_heads * mixer.k_dim + mixer.num_v_heads * mixer.v_dim
            return {
                "x": ((B, C, channels), dtype),
                "log_decay": ((B, C, mixer.num_v_heads), jnp.float32),
                "beta": ((B, C, mixer.num_v_heads), dtype),
                "state": ((B, mixer.num_v_heads, mixer.k_dim, mixer.v_dim), jnp.float32),
                "read": ((B,), jnp.int32),
            }


@dataclasses.dataclass(frozen=True)
class CachedContext:
    """A token sees the slots up to its own."""

    positions: jax.Array  # int [B, S], the slots

    def attend(self, q, k, v, scoring, sinks, cache):
        keys, values = write((cache["keys"], cache["values"]), (k, v), self.positions)
        out = cached_attention(q, keys, values, self.positions, scoring=scoring, sinks=sinks)
        return out, {"keys": keys, "values": values}

    def recur(self, x, conv, log_decay, beta, dims, cache):
        """A recurrent state cannot forget a draft that is refused later. So the cache keeps the
        inputs by slot, like keys and values, and the state of the first `read` tokens only: it is
        taken forward to the first slot of each call, when what stands before it is final.
        """
        inputs = write(
            (cache["x"], cache["log_decay"], cache["beta"]), (x, log_decay, beta), self.positions
        )
        rows, before = jnp.arange(x.shape[0]), jnp.arange(1 - conv.shape[0], 1)

        def step(state: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The token in `slot` int [B] of the state before it -> new state, output."""
            around = slot[:, None] + before
            inside = jnp.where(around[..., None] >= 0, inputs[0][rows[:, None], around], 0)
            convolved = causal_conv(inside, conv, jnp.ones_like(around))[:, -1]
            q, k, v = split_heads(convolved, dims)
            out, state = gated_delta_step(
                state, q, k, v, inputs[1][rows, slot], inputs[2][rows, slot]
            )
            return state, out

        def catch_up(carry):
            state, read = carry
            behind = read < self.positions[:, 0]
            new, _ = step(state, read)
            return jnp.where(behind[:, None, None, None], new, state), read + behind

        state, read = jax.lax.while_loop(
            lambda carry: (carry[1] < self.positions[:, 0]).any(),
            catch_up,
            (cache["state"], cache["read"]),
        )
        _, out = jax.lax.scan(step, state, self.positions.T)
        names = ("x", "log_decay", "beta")
        return jnp.moveaxis(out, 0, 1), {
            **dict(zip(names, inputs, strict=True)),
            "state": state,
            "read": read,
        }


def write(
    cache: tuple[jax.Array, ...],  # each [B, C, ...]
    new: tuple[jax.Array, ...],  # each [B, S, ...]
    slots: jax.Array,  # int [B, S]
) -> tuple[jax.Array, ...]:
    """Cache with the new keys and values, or whatever belongs to a token, in their slots."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return tuple(
        old.at[rows, slots].set(x.astype(old.dtype)) for old, x in zip(cache, new, strict=True)
    )


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
        decoder.logits(params, model.dims, at(last, prompt_length - 1)),
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
            jax.random.fold_in(key, length.max()),
            decoder.logits(params, model.dims, last[:, 0]),
            temperature,
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
