"""What a drafter is to the rest of MaxDraft.

    position i of a document sees the verified context up to i, is given token x[i+1], and drafts
    K distributions, the k-th over x[i+2+k]; the teacher at position i+1+k supervises it

EAGLE-3 makes these K distributions in K passes, each reading the one before; a block drafter
(DFlash) in one pass over K masked tokens. Training, evaluation, export, benchmark and reports know
this class; decoding knows its `decode_functions`, as decoding/drafter.py describes them. A drafter
is a folder `drafts/<kind>/` whose `drafter.py` has its class as `DRAFTER`; `registry.py` finds it.

B batch, T tokens in a packed row, L = B * T tokens of a device flattened, H hidden size,
C captured layers, K drafts of a position, R positions in a block, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft.drafts.checkpoint_format import CheckpointFormat
from MaxDraft.errors import UserError
from MaxDraft.layers.attention import document_starts
from MaxDraft.layers.attention_keys import KeyValueBlocks
from MaxDraft.layers.params import Tree
from MaxDraft.targets.dims import DecoderDims


class DrafterError(UserError):
    """A drafter that is not known, or one that does not fit its target."""


@dataclasses.dataclass(frozen=True)
class DrafterOptions:
    """What a user may choose of a drafter; 0 means as the target has it. Keys of base.yml."""

    draft_vocab_size: int
    intermediate_size: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    fc_norm: bool = False
    norm_output: bool = False


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which positions train, and what their loss is."""

    ttt_length: int = 7  # K of a drafter that rolls out
    loss: str = "kl"  # one of losses.LOSSES
    alignment: str = "serving"  # or "specforge"
    denominator: str = "supervised"  # or "specforge"
    decay: float = 0.8  # of step k's loss, to the power of k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftInputs:
    """What a drafter reads of the packed rows of a device, flattened to [L]."""

    embeddings: jax.Array  # [L, H]
    aux_hidden_states: jax.Array  # [L, C * H] outputs of the target's captured layers
    positions: jax.Array  # int [L] inside each document
    document_starts: jax.Array  # int [L] where each token's document begins
    special_embeddings: jax.Array  # [S, H] of the drafter's special_token_ids
    row_length: int = dataclasses.field(metadata={"static": True})  # T

    @classmethod
    def from_rows(
        cls,
        embeddings: jax.Array,  # [B, T, H]
        aux_hidden_states: jax.Array,  # [B, T, C * H]
        positions: jax.Array,  # int [B, T]
        segment_ids: jax.Array,  # int [B, T]
        special_embeddings: jax.Array | None = None,  # [S, H]; None: there are none
    ) -> DraftInputs:
        """Flattens rows to [L]; no document goes on from one packed row to the next."""
        if special_embeddings is None:
            special_embeddings = jnp.zeros((0, embeddings.shape[-1]), embeddings.dtype)
        B, T = segment_ids.shape
        offsets = jnp.arange(B, dtype=jnp.int32)[:, None] * T
        starts = document_starts(segment_ids) + offsets
        arrays = (embeddings, aux_hidden_states, positions, starts)
        flat = (x.reshape(-1, *x.shape[2:]) for x in arrays)
        return cls(*flat, special_embeddings=special_embeddings, row_length=T)


class Drafter(abc.ABC):
    """A drafter of certain dimensions. Subclasses are frozen dataclasses with the field `dims`.

    Hashable, so that jitted functions can be closed over it; holds no arrays.
    """

    kind: ClassVar[str]
    checkpoint_format: ClassVar[CheckpointFormat]  # how it lies in the folders of serving engines
    dims: Any  # has hidden_size and target_vocab_size, those of the target it is made for

    # ------------------------------------------------------------------- dimensions and identity
    @classmethod
    @abc.abstractmethod
    def from_options(cls, options: DrafterOptions, target: DecoderDims) -> Drafter:
        """The drafter that a user asks for on a target; DrafterError where it cannot be made."""

    @classmethod
    @abc.abstractmethod
    def from_saved_dims(cls, saved: Mapping[str, Any]) -> Drafter:
        """Inverse of `saved_dims`; also reads what older versions saved."""

    @abc.abstractmethod
    def saved_dims(self) -> dict[str, Any]:
        """All dimensions, JSON-able: what a checkpoint says of them."""

    @classmethod
    @abc.abstractmethod
    def captured_layers(cls, layer_ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
        """0-based target layers whose output is read, defaults where `layer_ids` is empty.

        Raises TargetError where a target of `num_layers` layers does not have them.
        """

    # -------------------------------------------------------------------------------- parameters
    @abc.abstractmethod
    def params_table(self) -> Tree:
        """Table of `Param`: shapes, logical axes, initial values, published tensor names."""

    @property
    @abc.abstractmethod
    def draft_vocab_size(self) -> int | None:
        """D, the target's tokens that can be drafted; None: all of them, and no choice is made."""

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Target ids whose embeddings are read besides the text's: a block's mask token."""
        return ()

    @property
    @abc.abstractmethod
    def trains_lm_head(self) -> bool:
        """Whether params["lm_head"] [H, D] is the drafter's own; else the target's is used."""

    # ---------------------------------------------------------------------------------- training
    @abc.abstractmethod
    def num_steps(self, config: LossConfig) -> int:
        """K, the drafts of a position."""

    @abc.abstractmethod
    def loss_mask(
        self, turn_ids: jax.Array, segment_ids: jax.Array, config: LossConfig
    ) -> jax.Array:
        """int [B, T] each -> bool [K, B, T]: positions whose k-th draft is supervised."""

    @abc.abstractmethod
    def step_weights(self, config: LossConfig) -> np.ndarray:
        """float [K]: what the mean loss of each step counts in the loss that is reported."""

    @abc.abstractmethod
    def loss_totals(self, in_vocab_loss_mask: jax.Array, config: LossConfig) -> jax.Array:
        """bool [K, L] -> float32; its sum over all devices is what `loss_weights` divides by."""

    @abc.abstractmethod
    def loss_weights(
        self, in_vocab_loss_mask: jax.Array, totals: jax.Array, config: LossConfig
    ) -> jax.Array:
        """bool [K, L] -> float32 [K, L]: what each position's loss counts in the total."""

    @abc.abstractmethod
    def per_token(
        self, params: Tree, inputs: DraftInputs
    ) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array], ...]]:
        """What every token needs -> state [L, H], and (k, v) [1, L, M, d] of each draft layer.

        The state is read at the block's own positions, keys and values by all that see them.
        """

    @abc.abstractmethod
    def draft_block(
        self,
        params: Tree,
        state: jax.Array,  # [R, H] of per_token, at the positions
        keys: tuple[KeyValueBlocks, ...],  # of per_token, one a draft layer
        # gradients so far, see attention.interval_attention
        d_keys: tuple[KeyValueBlocks, ...] | None,
        inputs: DraftInputs,
        positions: jax.Array,  # int [R] places in 0..L-1; -1: none
        num_steps: int,  # K
    ) -> tuple[jax.Array, tuple[KeyValueBlocks, ...] | None]:
        """-> what the LM head is multiplied with [K, R, H], d_keys."""

    @property
    @abc.abstractmethod
    def decode_functions(self) -> ModuleType:
        """Module of empty_cache, absorb and draft, as decoding/drafter.py describes them."""

    @abc.abstractmethod
    def flops_per_token(
        self, num_steps: int, length: float, supervised_share: float
    ) -> dict[str, float]:
        """Model FLOPs of a training step by part, for one token of a document of `length`."""
