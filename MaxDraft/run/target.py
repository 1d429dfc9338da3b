"""The target side of a run: config.json -> dimensions, parameter table, the head that fits it.

Reads the Config; loads no weight.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft import distributed
from MaxDraft.convert.heads import load as head_import
from MaxDraft.convert.safetensors_files import read_json
from MaxDraft.convert.target import checkpoint as target_checkpoint
from MaxDraft.convert.target.quantized_params import keep_quantized
from MaxDraft.drafts.eagle3.head import HeadDims
from MaxDraft.head_dims import head_dims
from MaxDraft.layers.params import Tree
from MaxDraft.layers.rope import Rope
from MaxDraft.metric_logger import say
from MaxDraft.pyconfig import Config
from MaxDraft.targets import plan, registry
from MaxDraft.targets.dims import DecoderDims, TargetError
from MaxDraft.targets.table import decoder_params
from MaxDraft.tiny_target.build import ensure_tiny_target


@dataclasses.dataclass(frozen=True)
class Target:
    """A target checkpoint, read but not loaded."""

    path: Path
    config: dict[str, Any]  # the language model's part of its config.json
    dims: DecoderDims
    capture: tuple[int, ...]  # layers whose output the head reads
    fingerprint: str


def with_embedded_target(config: Config) -> Config:
    """model_name=tiny without a target_path: makes its target and conversations, and names them."""
    if config.target_path:
        return config
    if jax.process_index() == 0:
        ensure_tiny_target(_tiny_folder(config), say)
    distributed.sync("tiny target")
    made = ensure_tiny_target(_tiny_folder(config), say)
    return Config(
        config.as_dict()
        | {
            "target_path": str(made.target_path),
            "grain_train_files": config.grain_train_files or str(made.conversations_path),
        }
    )


def _tiny_folder(config: Config) -> Path:
    return Path(config.base_output_directory).expanduser().absolute() / "tiny-target"


def open_target(config: Config) -> Target:
    """Reads and checks the target's config.json against the model file; loads no weight."""
    path = config.target_directory
    hf_config = registry.text_config(target_checkpoint.read_config(path))
    target_checkpoint.open_weights(path)  # refuses what cannot be read before any data is encoded
    target_checkpoint.check_target_config(
        config.target_config, hf_config, f"configs/models/{config.model_name}.yml"
    )
    dims = registry.dims_from_config(hf_config)
    capture = plan.check_capture(config.target_layer_ids, dims.num_layers)
    if config.max_target_length > dims.max_length:
        raise TargetError(
            f"max_target_length={config.max_target_length} is longer than the {dims.max_length} "
            f"positions of the target (max_position_embeddings, with longrope the original ones)"
        )
    return Target(path, hf_config, dims, capture, target_checkpoint.target_fingerprint(path))


def stop_token_ids(target: Target) -> tuple[int, ...]:
    """The tokens at which serving stops: eos_token_id of config.json and generation_config.json."""
    sources = {"config.json": target.config}
    if (target.path / "generation_config.json").is_file():
        sources["generation_config.json"] = read_json(target.path / "generation_config.json")
    stops = set()
    for name, source in sources.items():
        value = source.get("eos_token_id") if isinstance(source, dict) else None
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int for i in ids):
            raise TargetError(
                f"{target.path / name}: eos_token_id is {value!r}, and must be a token id or a "
                f"list of them"
            )
        stops.update(ids)
    return tuple(sorted(stops))


def target_table(config: Config, target: Target, keep: bool) -> Tree:
    """The target's parameters as they lie in memory; keep: quantized where its files are."""
    table = decoder_params(target.dims, target.capture, jnp.dtype(config.weight_dtype))
    if not keep:
        return table
    return keep_quantized(table, target_checkpoint.open_weights(target.path))


def wanted_head_dims(config: Config, target: DecoderDims) -> HeadDims:
    """The head's dimensions; a warm start keeps the rotary embedding and epsilon of its head."""
    dims = head_dims(config, target)
    if config.load_parameters_path:
        warm = head_import.load_head(Path(config.load_parameters_path).expanduser()).dims
        dims = dataclasses.replace(dims, rope=warm.rope, norm_eps=warm.norm_eps)
    return dims


# Names of Rope's fields in checkpoints that were saved before they were Hugging Face's.
_FORMER_ROPE_FIELDS = {
    "head_dim": "rotary_dim",
    "kind": "rope_type",
    "original_length": "original_max_position_embeddings",
    "cos_scale": "attention_scaling",
    "factors": "short_factor",
}


def saved_head_dims(saved: dict[str, Any]) -> HeadDims:
    """The dimensions that a checkpoint's identity holds as JSON, of older checkpoints too."""
    fields = {_FORMER_ROPE_FIELDS.get(key, key): value for key, value in saved["rope"].items()}
    rope = Rope(**{**fields, "short_factor": tuple(fields.get("short_factor", ()))})
    return HeadDims(**{**saved, "rope": rope})
