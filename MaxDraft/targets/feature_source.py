"""Where a training step gets the target's hidden states and teacher from: a feature source.

The step asks a source for the `TargetOutputs` of a batch, for rows of the target's embedding and LM
head, and for its vocabulary size and soft cap; it knows nothing else of a target. Today there is
one source, the running target itself; stored features can stand behind the same members.

B batch, T tokens in a packed row, H hidden size, C captured layers, V vocabulary, D draft tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from MaxDraft.layers.params import Tree
from MaxDraft.targets import decoder
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.table import decoder_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherOutputs:
    """What the target says at every position about the token that follows."""

    last_hidden_state: jax.Array  # [..., H] after the final norm
    argmax: jax.Array  # int32 [...] over all V tokens
    logsumexp: jax.Array  # float32 [...] of all V logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetOutputs:
    """What a drafter learns from, at every token of a batch."""

    embeddings: jax.Array  # [..., B, T, H] of the tokens, the target's own
    aux_hidden_states: jax.Array  # [..., B, T, C * H] outputs of the captured layers
    teacher: TeacherOutputs  # [..., B, T, ...]


@dataclasses.dataclass(frozen=True)
class BatchField:
    """An array of a batch: its shape behind [A, B, T], its dtype, and the logical axes of all."""

    shape: tuple[int, ...] = ()
    dtype: Any = jnp.int32
    axes: tuple[str | None, ...] = (None, "draft_batch", None)


class FeatureSource(Protocol):
    """What gives `TargetOutputs`; hashable, and holds no arrays."""

    vocab_size: int  # V
    logit_softcap: float  # of the target's logits; 0: none

    def params_table(self) -> Tree:
        """Table of the parameters that `outputs` and `teacher_lm_head` are given."""

    def batch_fields(self) -> Mapping[str, BatchField]:
        """The arrays of a batch that `outputs` reads, by name."""

    def outputs(
        self, params: Tree, batch: Mapping[str, jax.Array], teacher_mask: jax.Array
    ) -> TargetOutputs:
        """Of one micro-batch [B, T]. teacher_mask bool [B, T]: where the teacher is needed."""

    def teacher_lm_head(self, params: Tree, token_ids: jax.Array) -> jax.Array:
        """The target's LM head [H, D], columns of `token_ids` int32 [D]."""

    def embed(self, params: Tree, token_ids: jax.Array) -> jax.Array:
        """The target's embeddings [S, H] of `token_ids` int32 [S]."""


@dataclasses.dataclass(frozen=True)
class OnlineTarget:
    """The target itself, run on every batch."""

    dims: DecoderDims
    captured_layers: tuple[int, ...]
    dtype: Any = jnp.bfloat16  # of activations
    weight_dtype: Any = jnp.bfloat16
    attention_block: int = 256  # queries and keys attended at a time
    attention_kernel: str = "xla"  # one of attention.IMPLEMENTATIONS
    vocab_block: int = 256  # positions of a device whose logits over V exist at a time

    @property
    def vocab_size(self) -> int:
        return self.dims.vocab_size

    @property
    def logit_softcap(self) -> float:
        return self.dims.logit_softcap

    def params_table(self) -> Tree:
        return decoder_params(self.dims, self.captured_layers, jnp.dtype(self.weight_dtype))

    def batch_fields(self) -> Mapping[str, BatchField]:
        return {name: BatchField() for name in ("tokens", "positions", "segment_ids")}

    def outputs(
        self, params: Tree, batch: Mapping[str, jax.Array], teacher_mask: jax.Array
    ) -> TargetOutputs:
        embeddings, aux_hidden_states, last_hidden_state = decoder.forward(
            params,
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            self.dims,
            self.captured_layers,
            self.dtype,
            self.attention_block,
            self.attention_kernel,
        )
        argmax, logsumexp = decoder.teacher_argmax_and_logsumexp(
            params, self.dims, last_hidden_state, teacher_mask, self.vocab_block
        )
        teacher = TeacherOutputs(last_hidden_state, argmax, logsumexp)
        return TargetOutputs(embeddings, aux_hidden_states, teacher)

    def teacher_lm_head(self, params: Tree, token_ids: jax.Array) -> jax.Array:
        return decoder.teacher_lm_head(params, token_ids)

    def embed(self, params: Tree, token_ids: jax.Array) -> jax.Array:
        return decoder.embed(params, token_ids, self.dtype)
