"""What decoding knows and carries from round to round; generate.py says what it does with it.

B batch, C captured layers, gamma drafts (Leviathan et al. 2023), H hidden size, D draft vocabulary,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from MaxDraft.decoding.acceptance import fold_in, split_keys
from MaxDraft.decoding.drafter import DecodeDrafter, NoDrafter
from MaxDraft.decoding.target_model import CachedContext, TargetModel
from MaxDraft.layers.attention import read_slots
from MaxDraft.layers.params import Tree


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The two models and how they decode. Hashable: compiled functions close over it."""

    target: TargetModel
    drafter: DecodeDrafter
    num_draft_tokens: int  # gamma, the root of the chain not counted
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float  # 0: greedy
    # Added to the rotary position where the drafter reads its own output.
    recurrent_position_offset: int = 0

    def without_drafts(self) -> DecodeSpec:
        """The target alone: one token for each of its passes."""
        return dataclasses.replace(self, drafter=NoDrafter(), num_draft_tokens=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeParams:
    """The weights of both models, and the draft vocabulary."""

    target: Tree
    # What the drafter's functions take as params. For a drafter that uses the target's LM head,
    # evaluation adds it as params["lm_head"].
    drafter: Tree = None
    draft_to_target: jax.Array | None = None  # int32 [D]; None: the target's whole vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reply:
    """The replies to B prompts, and what they cost."""

    tokens: jax.Array  # int32 [B, max_new_tokens]
    length: jax.Array  # int32 [B], the stop token included
    verify_steps: jax.Array  # int32 [B]: the target's passes after the prompt
    # int32 [B, gamma]: how often draft j was accepted, also where the reply had ended before it.
    accepted_drafts: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Replies that are being written, and what both models have read of them."""

    keys: jax.Array  # [B] random key of each prompt
    prompt_length: jax.Array  # int32 [B]
    reply: Reply
    active: jax.Array  # bool [B]: the reply goes on
    target_cache: Any
    drafter_cache: Any
    drafter_state: Any  # what the drafter starts from
    num_slots: int = dataclasses.field(metadata={"static": True})

    @property
    def num_committed(self) -> jax.Array:
        """int32 [B]: n, tokens of the prompt and of the reply."""
        return self.prompt_length + self.reply.length

    @property
    def last_token(self) -> jax.Array:
        """int32 [B]: x[n-1], which neither model has read."""
        return read_slots(self.reply.tokens, self.reply.length - 1)

    @property
    def round_keys(self) -> tuple[jax.Array, jax.Array]:
        """The keys [B] of this round: to propose, and to accept."""
        return split_keys(fold_in(self.keys, 1 + self.reply.verify_steps))


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Drafts that may follow x[n-1]."""

    tokens: jax.Array  # int32 [B, gamma]
    distributions: (
        jax.Array | None
    )  # float32 [B, gamma, V] that they were drawn from; None: not drawn
    drafter_cache: Any


@dataclasses.dataclass(frozen=True)
class Verification:
    """What the target makes of x[n-1] and the drafts."""

    context: CachedContext
    aux_hidden_states: jax.Array  # [B, gamma + 1, C * H]
    logits: jax.Array  # float32 [B, gamma + 1, V]
    target_cache: Any


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """The drafts that stay, and the target's own token after them."""

    num_accepted: jax.Array  # int32 [B]: a
    tokens: jax.Array  # int32 [B, gamma + 1], of which the first a + 1 count
