"""The target as decoding runs it: with a cache, some tokens at a time.

B batch, S tokens fed at once, `slots` of the cache, C captured layers, H hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft.layers.attention import cached_attention, read_slots, slots_up_to, write_slots
from MaxDraft.layers.delta_net import causal_conv, gated_delta_step
from MaxDraft.layers.params import Tree
from MaxDraft.sharding import constrain
from MaxDraft.targets import decoder
from MaxDraft.targets.dims import MLA, Attention, DecoderDims, DeltaNet
from MaxDraft.targets.mixers import split_heads
from MaxDraft.targets.plan import LayerGroup, layer_groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedContext:
    """Where tokens are written in the cache, where they stand in the text, and what they see."""

    slots: jax.Array  # int [B, S] the cache slot of each token
    positions: jax.Array  # int [B, S] of the rotary embedding
    visible: jax.Array  # bool [B, S, slots] the slots that each token sees, its own included
    slot_positions: jax.Array  # int [B, slots] the position of the token in each slot

    @classmethod
    def from_chain(cls, positions: jax.Array, num_slots: int) -> CachedContext:
        """Tokens that follow one another: a token lies in the slot of its position and sees all
        slots up to its own.

        positions: int [B, S].
        """
        every_slot = jnp.broadcast_to(jnp.arange(num_slots), (len(positions), num_slots))
        return cls(positions, positions, slots_up_to(positions, num_slots), every_slot)

    def attend(self, q, k, v, scoring, sinks, cache):
        keys, values = write_slots((cache["keys"], cache["values"]), (k, v), self.slots)
        out = cached_attention(
            q,
            keys,
            values,
            self.visible,
            scoring=scoring,
            positions=self.positions,
            slot_positions=self.slot_positions,
            sinks=sinks,
        )
        return out, {"keys": keys, "values": values}

    def recur(self, x, conv, log_decay, beta, dims, cache):
        """The gated delta rule, for chains only: it reads the slots in their order.

        A recurrent state cannot drop refused drafts, so inputs are cached per slot and the state
        advances only over committed tokens: at each call, from the `read` tokens that it holds to
        the call's first slot.
        """
        names = ("x", "log_decay", "beta")
        inputs = write_slots(tuple(cache[name] for name in names), (x, log_decay, beta), self.slots)
        taps = jnp.arange(1 - conv.shape[0], 1)

        def step(state: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
            """State before the token in `slot` int [B] -> state after it, its output."""
            window = slot[:, None] + taps  # the slots that the convolution reads
            x = jnp.where(window[..., None] >= 0, read_slots(inputs[0], window), 0)
            convolved = causal_conv(x, conv, jnp.ones_like(window))[:, -1]
            q, k, v = split_heads(convolved, dims)
            out, state = gated_delta_step(
                state, q, k, v, read_slots(inputs[1], slot), read_slots(inputs[2], slot)
            )
            return state, out

        def catch_up(carry):
            state, read = carry
            behind = read < self.slots[:, 0]
            new, _ = step(state, read)
            return jnp.where(behind[:, None, None, None], new, state), read + behind

        state, read = jax.lax.while_loop(
            lambda carry: (carry[1] < self.slots[:, 0]).any(),
            catch_up,
            (cache["state"], cache["read"]),
        )
        _, out = jax.lax.scan(step, state, self.slots.T)
        new_cache = dict(zip(names, inputs, strict=True)) | {"state": state, "read": read}
        return jnp.moveaxis(out, 0, 1), new_cache


@dataclasses.dataclass(frozen=True)
class TargetModel:
    """What decoding must know of a target. Hashable, so that a compiled function can close over
    it.
    """

    dims: DecoderDims
    captured_layers: tuple[int, ...]
    dtype: Any

    def empty_cache(self, batch: int, num_slots: int) -> Any:
        """Zero caches, one per layer of a unit, stacked over the group's repeats."""

        def zeros(array: CacheArray, repeats: int) -> jax.Array:
            return jnp.zeros((repeats, batch, *array.shape), array.dtype)

        return self._placed(
            tuple(
                tuple(
                    {name: zeros(array, group.repeats) for name, array in arrays.items()}
                    for arrays in unit
                )
                for group, unit in zip(
                    self._layer_groups, self._cache_arrays(num_slots), strict=True
                )
            )
        )

    def embed(self, params: Tree, tokens: jax.Array) -> jax.Array:
        """tokens int [B, S] -> their embeddings [B, S, H], sharded as target_batch."""
        tokens = constrain(tokens, "target_batch", None)
        embeddings = decoder.embed(params, tokens, self.dtype)
        return constrain(embeddings, "target_batch", None, None)

    def extend(
        self,
        params: Tree,
        cache: Any,
        tokens: jax.Array,  # int [B, S]
        context: CachedContext,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Reads tokens -> aux_hidden_states [B, S, C * H], last_hidden_state [B, S, H], cache."""
        embeddings = self.embed(params, tokens)
        aux_hidden_states, last_hidden_state, cache = decoder.run_layers(
            params, embeddings, self.dims, self.captured_layers, context, cache
        )
        return aux_hidden_states, last_hidden_state, self._placed(cache)

    @property
    def _layer_groups(self) -> tuple[LayerGroup, ...]:
        return layer_groups(self.dims.layers, self.captured_layers)

    def _cache_arrays(self, num_slots: int) -> tuple[tuple[dict[str, CacheArray], ...], ...]:
        return tuple(
            tuple(_cache_arrays(layer.mixer, self.dtype, num_slots) for layer in group.unit)
            for group in self._layer_groups
        )

    def _placed(self, cache: Any) -> Any:
        """The cache split over the devices: prompts as the target's batch, heads as its heads."""
        return jax.tree.map(
            lambda array, x: constrain(x, None, "target_batch", *array.axes),
            self._cache_arrays(num_slots=0),
            cache,
            is_leaf=lambda x: isinstance(x, CacheArray),
        )


@dataclasses.dataclass(frozen=True)
class CacheArray:
    """An array that a layer keeps: shape and logical axes of one prompt's part."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any


def _cache_arrays(
    mixer: Attention | MLA | DeltaNet, dtype: Any, num_slots: int
) -> dict[str, CacheArray]:
    match mixer:
        case Attention(num_kv_heads=heads, head_dim=size):
            keys = CacheArray((num_slots, heads, size), (None, "target_kv_heads", None), dtype)
            return {"keys": keys, "values": keys}
        case MLA():
            axes = (None, "target_heads", None)
            size = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim
            return {
                "keys": CacheArray((num_slots, mixer.num_heads, size), axes, dtype),
                "values": CacheArray((num_slots, mixer.num_heads, mixer.v_head_dim), axes, dtype),
            }
        case DeltaNet(num_v_heads=heads):
            channels = 2 * mixer.num_k_heads * mixer.k_dim + heads * mixer.v_dim
            state = (heads, mixer.k_dim, mixer.v_dim)
            return {
                "x": CacheArray((num_slots, channels), (None, None), dtype),
                "log_decay": CacheArray((num_slots, heads), (None, None), jnp.float32),
                "beta": CacheArray((num_slots, heads), (None, None), dtype),
                "state": CacheArray(state, (None, None, None), jnp.float32),
                "read": CacheArray((), (), jnp.int32),
            }
