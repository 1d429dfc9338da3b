"""What decoding knows of a drafter: three functions over a cache of its own.

    empty_cache   a cache in which nothing has been read
    absorb        reads tokens that the target has verified, with the target's aux hidden states
    draft         proposes tokens that may follow the committed ones

With x[0..n-1] committed, the target has read x[0..n-2] and the drafter has absorbed positions
0..n-2; position i uses the aux hidden states of x[i] and the embedding of x[i+1], and lies in slot
i. A drafter writes what it needs for drafting into the free slots from n-1 on; absorb writes over
them. A drafter that needs more than gamma + 1 of them at the end of a text makes its cache longer
than it is asked to.

B batch, S positions read at once, `slots` of the cache, C captured layers, H hidden size,
V vocabulary, gamma drafts (Leviathan et al. 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from MaxDraft.layers.params import Tree

Choose = Callable[[int, jax.Array], tuple[jax.Array, jax.Array | None]]


class DecodeDrafter(Protocol):
    """How a draft head is served. Hashable, so that a compiled function can close over it."""

    def empty_cache(self, batch: int, num_slots: int, dtype: Any) -> Any:
        """Arrays [B, num_slots, ...], split over the devices by the batch."""

    def absorb(
        self,
        params: Tree,
        cache: Any,
        next_embeddings: jax.Array,  # [B, S, H] of x[i+1] at position i
        aux_hidden_states: jax.Array,  # [B, S, C * H] at x[i]
        slots: jax.Array,  # int [B, S] where the positions are written
        positions: jax.Array,  # int [B, S] of the rotary embedding
        visible: jax.Array,  # bool [B, S, slots] the slots that each position sees
    ) -> tuple[Any, Any]:
        """-> what drafting may start from after each position, arrays [B, S, ...]; cache."""

    def draft(
        self,
        params: Tree,
        cache: Any,
        *,
        embed: Callable[[jax.Array], jax.Array],  # token ids int [B, S] -> [B, S, H]
        state: Any,  # arrays [B, ...]: what absorb returned at position n-2
        token: jax.Array,  # int [B]: x[n-1]
        slots: jax.Array,  # int [B]: n-1, the first free slot
        positions: jax.Array,  # int [B]: n-1, the position of x[n-1]
        visible: jax.Array,  # bool [B, slots]: slots 0..n-2
        choose: Choose,
        num_draft_tokens: int,  # gamma
        recurrent_position_offset: int,  # added where the drafter reads its own output
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """-> drafts int32 [B, gamma], their distributions float32 [B, gamma, V] or None, cache.

        choose: (number of the draft, logits [B, draft vocabulary]) -> token ids of the target [B]
            and the distribution [B, V] that they were drawn from, None where nothing was drawn.
        """


@dataclasses.dataclass(frozen=True)
class BoundDrafter:
    """A module of a drafter's functions, and its dimensions, as a DecodeDrafter."""

    functions: ModuleType
    dims: Any

    def empty_cache(self, batch, num_slots, dtype):
        return self.functions.empty_cache(self.dims, batch, num_slots, dtype)

    def absorb(self, params, cache, *inputs):
        return self.functions.absorb(params, self.dims, cache, *inputs)

    def draft(self, params, cache, **request):
        return self.functions.draft(params, self.dims, cache, **request)


@dataclasses.dataclass(frozen=True)
class NoDrafter:
    """Proposes nothing: every round commits the one token that the target chooses itself."""

    def empty_cache(self, batch, num_slots, dtype):
        return ()

    def absorb(self, params, cache, *inputs):
        return (), cache

    def draft(self, params, cache, *, token, **request):
        return jnp.zeros((len(token), 0), jnp.int32), None, cache
