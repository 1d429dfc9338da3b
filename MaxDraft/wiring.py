"""What the entry scripts share: from a Config to the parts of a run.

Config -> jax set up, target (dimensions, then weights), data, draft vocabulary, head dimensions.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from MaxDraft import pyconfig, sharding
from MaxDraft.checkpointing import ResumeError
from MaxDraft.convert import target_checkpoint
from MaxDraft.convert.errors import CheckpointError
from MaxDraft.drafts.eagle3 import HeadDims
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.layers import params as parameters
from MaxDraft.metric_logger import say
from MaxDraft.pyconfig import Config, ConfigError
from MaxDraft.sharding import ShardingError
from MaxDraft.targets import decoder, registry
from MaxDraft.targets.decoder import DecoderDims, TargetError
from MaxDraft.train_step import Frozen

# Mistakes of the user or the machine: told in plain words, without a traceback, exit status 2.
USER_ERRORS = (
    ConfigError,
    CheckpointError,
    DataError,
    ResumeError,
    ShardingError,
    TargetError,
)


def run_main(main: Callable[[Sequence[str]], int]) -> None:
    """Runs an entry script's main(argv) and exits with its status."""
    try:
        sys.exit(main(sys.argv))
    except USER_ERRORS as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def start_jax(config: Config) -> None:
    """Settings of the process; on several processes, joins them. Before any other use of jax."""
    if config.distributed_coordinator == "auto":
        jax.distributed.initialize()
    elif config.distributed_coordinator:
        jax.distributed.initialize(
            config.distributed_coordinator,
            config.distributed_num_processes,
            config.distributed_process_id,
        )
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    if config.jax_cache_dir:
        jax.config.update(
            "jax_compilation_cache_dir", str(Path(config.jax_cache_dir).expanduser())
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_mesh(config: Config) -> Mesh:
    """The device mesh of the config's ici_* and dcn_* sizes."""
    return sharding.make_mesh(
        config.mesh_axes,
        [getattr(config, f"ici_{axis}_parallelism") for axis in config.mesh_axes],
        [getattr(config, f"dcn_{axis}_parallelism") for axis in config.mesh_axes],
    )


@dataclasses.dataclass(frozen=True)
class Target:
    """A target checkpoint, read but not loaded."""

    path: Path
    config: dict[str, Any]  # its config.json
    dims: DecoderDims
    capture: tuple[int, ...]
    fingerprint: str


def open_target(config: Config) -> Target:
    """Reads and checks the target's config.json against the model file; loads no weight."""
    path = config.target_directory
    hf_config = target_checkpoint.read_config(path)
    target_checkpoint.check_target_config(
        config.target_config, hf_config, f"configs/models/{config.model_name}.yml"
    )
    dims = registry.dims_from_config(hf_config)
    capture = decoder.check_capture(config.target_layer_ids, dims.num_layers)
    if config.max_target_length > dims.max_length:
        raise TargetError(
            f"max_target_length={config.max_target_length} is longer than the target's "
            f"max_position_embeddings={dims.max_length}"
        )
    return Target(path, hf_config, dims, capture, target_checkpoint.target_fingerprint(path))


def head_dims(config: Config, target: DecoderDims) -> HeadDims:
    """The head's dimensions: the target's, where the config does not say otherwise."""
    head_dim = config.draft_head_dim or target.head_dim
    return HeadDims(
        hidden_size=target.hidden_size,
        intermediate_size=config.draft_intermediate_size or target.intermediate_size,
        num_heads=config.draft_num_attention_heads or target.num_heads,
        num_kv_heads=config.draft_num_key_value_heads or target.num_kv_heads,
        head_dim=head_dim,
        draft_vocab_size=min(config.draft_vocab_size, target.vocab_size),
        target_vocab_size=target.vocab_size,
        norm_eps=target.norm_eps,
        rope=dataclasses.replace(target.rope, head_dim=head_dim),
    )


def load_frozen(
    config: Config, target: Target, vocabulary: DraftVocabulary, mesh: Mesh
) -> Frozen:
    """The target's weights, each device reading its own slices, and the draft vocabulary."""
    table = decoder.decoder_params(target.dims, target.capture, jnp.dtype(config.weight_dtype))
    placement = parameters.shardings(table, mesh, config.logical_axis_rules)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def replicate(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

    return Frozen(
        target=target_checkpoint.load_target(target.path, table, placement),
        draft_to_target=replicate(vocabulary.draft_to_target.astype(np.int32)),
        in_vocabulary=replicate(vocabulary.t2d),
    )


def stop_ids(target: Target, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Tokens that end a reply: eos_token_id of generation_config.json, config.json, tokenizer."""
    found: set[int] = {tokenizer_eos} if tokenizer_eos is not None else set()
    for source in (target_checkpoint.read_generation_config(target.path), target.config):
        ids = source.get("eos_token_id")
        found |= set(ids) if isinstance(ids, list) else ({ids} if ids is not None else set())
    if not found:
        raise TargetError(
            f"neither {target.path}/generation_config.json nor config.json nor the tokenizer "
            f"names an eos_token_id: no reply could ever end"
        )
    return tuple(sorted(found))


__all__ = ["Target", "head_dims", "load_frozen", "make_mesh", "open_target", "pyconfig", "say"]
