"""A run's target: config.json -> dimensions, captured layers, parameter table, stop tokens.

Reads the Config; loads no weight.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft import distributed
from MaxDraft.config_checks import EMBEDDED_TARGET_FOLDER
from MaxDraft.convert.safetensors_files import read_json
from MaxDraft.convert.target import checkpoint as target_checkpoint
from MaxDraft.convert.target.config_check import check_target_config
from MaxDraft.convert.target.quantized_params import keep_quantized
from MaxDraft.drafts.drafter import Drafter
from MaxDraft.layers.params import Tree
from MaxDraft.metric_logger import say
from MaxDraft.pyconfig import Config
from MaxDraft.targets import registry, stop_tokens
from MaxDraft.targets.dims import DecoderDims, TargetError
from MaxDraft.targets.table import decoder_params
from MaxDraft.tiny_target.build import ensure_tiny_target


@dataclasses.dataclass(frozen=True)
class Target:
    """A target checkpoint, read but not loaded."""

    path: Path
    config: dict[str, Any]  # the language model's part of its config.json
    dims: DecoderDims
    captured_layers: tuple[int, ...]  # 0-based, whose outputs the drafter reads
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
    return Path(config.base_output_directory).expanduser().absolute() / EMBEDDED_TARGET_FOLDER


def open_target(config: Config, drafter: type[Drafter]) -> Target:
    """Reads and checks the target's config.json against the model file; loads no weight.

    drafter: says which layers of the target are captured.
    """
    path = config.target_directory
    hf_config = registry.text_config(target_checkpoint.read_config(path))
    target_checkpoint.open_weights(path)  # refuses what cannot be read before any data is encoded
    check_target_config(config.target_config, hf_config, f"configs/models/{config.model_name}.yml")
    dims = registry.dims_from_config(hf_config)
    left_out = registry.fields_left_out(hf_config)
    if left_out and distributed.is_main_process():
        say(f"target: fields of config.json that are not read: {', '.join(left_out)}")
    captured_layers = drafter.captured_layers(config.target_layer_ids, dims.num_layers)
    if config.max_target_length > dims.max_length:
        raise TargetError(
            f"max_target_length={config.max_target_length} is longer than the {dims.max_length} "
            f"positions of the target (max_position_embeddings, with longrope the original ones)"
        )
    fingerprint = target_checkpoint.target_fingerprint(path)
    return Target(path, hf_config, dims, captured_layers, fingerprint)


def stop_token_ids(target: Target) -> tuple[int, ...]:
    """The tokens at which serving stops: eos_token_id of config.json and generation_config.json."""
    path = target.path / "generation_config.json"
    generation_config = read_json(path) if path.is_file() else None
    return stop_tokens.stop_token_ids(target.config, generation_config)


def target_table(config: Config, target: Target, keep: bool) -> Tree:
    """The target's parameters as they lie in memory; keep: quantized where its files are."""
    table = decoder_params(target.dims, target.captured_layers, jnp.dtype(config.weight_dtype))
    if not keep:
        return table
    return keep_quantized(table, target_checkpoint.open_weights(target.path))
