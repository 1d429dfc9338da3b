"""An EAGLE-3 head in the folder that serving engines read, and in those that others publish.

Tensors bear the published names. `d2t` holds OFFSETS, target id minus draft id: engines add it
without looking, and absolute ids would serve at an accept length of exactly 1. config.json says the
same thing in each engine's own spelling: old and new rope, and the captured layers twice, as
outputs (SGLang adds one itself) and as inputs of the next layer (vLLM).

Published folders name their layer `midlayer.*` or, as vLLM's speculators do, `layers.0.*`; the
tensors themselves tell which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from MaxDraft.drafts.checkpoint_format import CheckpointFormat, VocabularyTensor
from MaxDraft.drafts.eagle3 import checkpoint_config, twin_comparison
from MaxDraft.drafts.eagle3.checkpoint_config import LAYER_IDS
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.drafts.eagle3.head import head_params
from MaxDraft.drafts.rope_fields import rope_fields
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.params import Tree
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import TargetError

_FLAGS = ("fc_norm", "norm_output")
# HeadDims field -> its name in config.json, and the key that sets it (None: the target's)
_FIELDS = {
    "hidden_size": ("hidden_size", None),
    "intermediate_size": ("intermediate_size", "draft_intermediate_size"),
    "num_heads": ("num_attention_heads", "draft_num_attention_heads"),
    "num_kv_heads": ("num_key_value_heads", "draft_num_key_value_heads"),
    "head_dim": ("head_dim", "draft_head_dim"),
    "draft_vocab_size": ("draft_vocab_size", "draft_vocab_size"),
    "target_vocab_size": ("vocab_size", None),
    "norm_eps": ("rms_norm_eps", None),
    "rope": ("rope", None),
    "fc_norm": ("fc_norm", "draft_fc_norm"),
    "norm_output": ("norm_output", "draft_norm_output"),
}


class Eagle3Format(CheckpointFormat):
    """Names, fields and spellings of EAGLE-3 and EAGLE-3.1."""

    architecture: ClassVar[str] = "LlamaForCausalLMEagle3"

    # ----------------------------------------------------------------------------------- writing
    def config(
        self,
        dims: HeadDims,
        captured_layers: Sequence[int],
        target_config: Mapping[str, Any],
        target_name: str,
    ) -> dict[str, Any]:
        return {
            **_own_fields(self.architecture, dims, captured_layers),
            "max_position_embeddings": target_config["max_position_embeddings"],
            "bos_token_id": target_config.get("bos_token_id"),
            "eos_token_id": target_config.get("eos_token_id"),
            "pad_token_id": target_config.get("pad_token_id"),
            "target_model": target_name,
        }

    def vocabulary_tensors(self, vocabulary: DraftVocabulary) -> dict[str, np.ndarray]:
        """d2t int64 [D], t2d bool [V]."""
        return {
            "d2t": np.ascontiguousarray(vocabulary.d2t, dtype=np.int64),
            "t2d": np.ascontiguousarray(vocabulary.t2d, dtype=np.bool_),
        }

    def flags(self, dims: HeadDims) -> frozenset[str]:
        return frozenset(name for name in _FLAGS if getattr(dims, name))

    # ------------------------------------------------------------------ checking what was written
    def config_problems(
        self, config: Mapping[str, Any], dims: HeadDims, captured_layers: Sequence[int]
    ) -> list[str]:
        expected = _own_fields(self.architecture, dims, captured_layers)
        for name in ("rope_scaling", "rope_parameters"):  # compared below, as what they mean
            del expected[name]
        expected |= {name: True if getattr(dims, name) else None for name in _FLAGS}
        problems = [
            f"config.json: {name} is {config.get(name)!r}, must be {value!r}"
            for name, value in expected.items()
            if config.get(name) != value
        ]
        problems += [
            f"config.json: {name} is missing"
            for name in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
            if name not in config
        ]
        return problems + _rope_problems(config, dims)

    def vocabulary_problems(
        self, tensors: Mapping[str, np.ndarray], vocabulary: DraftVocabulary
    ) -> list[str]:
        problems, trained = [], np.asarray(vocabulary.draft_to_target, np.int64)
        offsets = tensors["d2t"]
        ids = np.arange(len(offsets)) + offsets
        if not np.array_equal(ids, trained):
            absolute = np.array_equal(offsets, trained) and len(ids) > 1
            first = int(np.flatnonzero(ids != trained)[0])
            problems.append(
                f"d2t: draft token {first} maps to target id {ids[first]}, trained as "
                f"{trained[first]}"
                + ("; it holds absolute ids where engines add an offset" if absolute else "")
            )
        if not np.array_equal(np.flatnonzero(tensors["t2d"]), trained):
            problems.append("t2d: does not mark the tokens of the draft vocabulary")
        return problems

    def twin_differences(
        self, folder: Path, params: Tree, dims: HeadDims, steps: int, seed: int = 0
    ) -> dict[str, float]:
        return twin_comparison.differences(folder, params, dims, steps, seed)

    # ----------------------------------------------------------------------------------- reading
    def recognizes(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """By the architecture's name; tpu-inference wants one that Llama itself has."""
        names = config.get("architectures") or [config.get("speculators_model_type")]
        names = [name for name in names if name] if isinstance(names, list) else [names]
        if any("eagle3" in str(name).lower() for name in names):
            return True
        return names in ([], ["LlamaForCausalLM"]) and "fc.weight" in tensor_names

    def read_config(self, config: Mapping[str, Any]) -> tuple[HeadDims, tuple[int, ...] | None]:
        return checkpoint_config.read_config(config)

    def parameter_table(self, dims: HeadDims, tensor_names: Collection[str]) -> Tree:
        table = head_params(dims)
        if not any(name.startswith("layers.0.") for name in tensor_names):
            return table
        return jax.tree.map(
            lambda p: dataclasses.replace(p, tensor=p.tensor.replace("midlayer.", "layers.0.")),
            table,
        )

    def vocabulary_layout(self, dims: HeadDims) -> dict[str, VocabularyTensor]:
        D, V = dims.draft_vocab_size, dims.target_vocab_size
        return {
            "d2t": VocabularyTensor((D,), "I64", ("I64", "I32"), required=D != V),
            "t2d": VocabularyTensor((V,), "BOOL", ("BOOL",), required=False),
        }

    def read_vocabulary(self, tensors: Mapping[str, np.ndarray], dims: HeadDims) -> DraftVocabulary:
        V = dims.target_vocab_size
        if "d2t" not in tensors:
            return DraftVocabulary(np.arange(V, dtype=np.int32), V)
        return DraftVocabulary.from_offsets(tensors["d2t"], V, tensors.get("t2d"))

    @property
    def embedding_copy(self) -> str:
        return "embed_tokens.weight"

    @property
    def training_only(self) -> frozenset[str]:
        """The target's LM head and last norm, from which speculators makes the teacher."""
        return frozenset({"verifier_lm_head.weight", "verifier_norm.weight"})

    def differences(self, dims: HeadDims, expected: HeadDims) -> list[str]:
        lines = []
        for field, (name, key) in _FIELDS.items():
            value, wanted = getattr(dims, field), getattr(expected, field)
            if value != wanted:
                advice = f"; set {key}={value}" if key else ""
                lines.append(f"{name}: the head has {value}, this run {wanted}{advice}")
        return lines

    def with_fields_of_checkpoint(self, dims: HeadDims, saved: HeadDims) -> HeadDims:
        """The rotary embedding and the epsilon of the norms."""
        return dataclasses.replace(dims, rope=saved.rope, norm_eps=saved.norm_eps)


def _own_fields(
    architecture: str, dims: HeadDims, captured_layers: Sequence[int]
) -> dict[str, Any]:
    """The fields of an export that do not depend on its target's config.json."""
    theta, scaling, parameters = rope_fields(dims.rope)
    flags = {name: True for name in _FLAGS if getattr(dims, name)}
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.target_vocab_size,
        "draft_vocab_size": dims.draft_vocab_size,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
        "rms_norm_eps": dims.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        **flags,
        "eagle_config": {LAYER_IDS: list(captured_layers), "use_aux_hidden_state": True},
        LAYER_IDS: [layer + 1 for layer in captured_layers],
    }


def _rope_problems(config: Mapping[str, Any], dims: HeadDims) -> list[str]:
    """Each spelling alone must read back as the rotary embedding that was trained."""
    problems = []
    spellings = {
        "rope_theta and rope_scaling": {k: config.get(k) for k in ("rope_theta", "rope_scaling")},
        "rope_parameters": {"rope_parameters": config.get("rope_parameters")},
    }
    for name, fields in spellings.items():
        try:
            rope = hf_config.rope({**fields, "head_dim": dims.head_dim})
        except TargetError as error:
            problems.append(f"config.json, {name}: {error}")
            continue
        if rope != dims.rope:
            problems.append(
                f"config.json: {name} says {rope}, the head was trained with {dims.rope}"
            )
    return problems
