"""EAGLE-3 as a drafter: K passes of one layer, each reading the output of the one before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft.drafts import alignment
from MaxDraft.drafts.drafter import Drafter, DrafterOptions, DraftInputs, LossConfig
from MaxDraft.drafts.eagle3 import decoding, flops, head, rollout
from MaxDraft.drafts.eagle3 import dims as dimensions
from MaxDraft.drafts.eagle3.checkpoint_format import Eagle3Format
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.layers.attention_keys import KeyValueBlocks
from MaxDraft.layers.params import Tree
from MaxDraft.targets.dims import DecoderDims


@dataclasses.dataclass(frozen=True)
class Eagle3(Drafter):
    """EAGLE-3 (Li et al. 2025), and EAGLE-3.1 by the switches of its dimensions."""

    dims: HeadDims
    kind: ClassVar[str] = "eagle3"
    checkpoint_format: ClassVar[Eagle3Format] = Eagle3Format()

    @classmethod
    def from_options(cls, options: DrafterOptions, target: DecoderDims) -> Eagle3:
        return cls(dimensions.dims_from_options(options, target))

    @classmethod
    def from_saved_dims(cls, saved: Mapping[str, Any]) -> Eagle3:
        return cls(dimensions.dims_from_json(saved))

    def saved_dims(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self.dims)))

    @classmethod
    def captured_layers(cls, layer_ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
        return dimensions.check_captured_layers(layer_ids, num_layers)

    def params_table(self) -> Tree:
        return head.head_params(self.dims)

    @property
    def draft_vocab_size(self) -> int:
        return self.dims.draft_vocab_size

    @property
    def trains_lm_head(self) -> bool:
        return True

    def num_steps(self, config: LossConfig) -> int:
        return config.ttt_length

    def loss_mask(
        self, turn_ids: jax.Array, segment_ids: jax.Array, config: LossConfig
    ) -> jax.Array:
        return alignment.loss_mask(turn_ids, segment_ids, config.ttt_length, config.alignment)

    def step_weights(self, config: LossConfig) -> np.ndarray:
        return config.decay ** np.arange(config.ttt_length)

    def loss_totals(self, in_vocab_loss_mask: jax.Array, config: LossConfig) -> jax.Array:
        """float32 [K]: the supervised positions of each step, or all positions."""
        if config.denominator == "specforge":
            return jnp.full(len(in_vocab_loss_mask), in_vocab_loss_mask.shape[1], jnp.float32)
        return in_vocab_loss_mask.sum(1).astype(jnp.float32)

    def loss_weights(
        self, in_vocab_loss_mask: jax.Array, totals: jax.Array, config: LossConfig
    ) -> jax.Array:
        """decay^k / totals_k where a position is supervised."""
        decay = config.decay ** jnp.arange(len(totals), dtype=jnp.float32)
        weights = decay / jnp.maximum(totals, 1.0)
        return jnp.where(in_vocab_loss_mask, weights[:, None], 0.0)

    def per_token(
        self, params: Tree, inputs: DraftInputs
    ) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array], ...]]:
        state, k, v = rollout.step_0_keys_values(params, self.dims, inputs)
        return state, ((k, v),)

    def draft_block(
        self,
        params: Tree,
        state: jax.Array,
        keys: tuple[KeyValueBlocks, ...],
        d_keys: tuple[KeyValueBlocks, ...] | None,
        inputs: DraftInputs,
        positions: jax.Array,
        num_steps: int,
    ) -> tuple[jax.Array, tuple[KeyValueBlocks, ...] | None]:
        d_layer = None if d_keys is None else d_keys[0]
        states, d_layer = rollout.rollout(
            params, self.dims, state, keys[0], d_layer, inputs, positions, num_steps
        )
        hidden = head.final_norm(params, self.dims, states)
        return hidden, None if d_keys is None else (d_layer,)

    @property
    def decode_functions(self) -> ModuleType:
        return decoding

    def flops_per_token(
        self, num_steps: int, length: float, supervised_share: float
    ) -> dict[str, float]:
        return flops.draft_flops_per_token(self.dims, num_steps, length, supervised_share)


DRAFTER = Eagle3
