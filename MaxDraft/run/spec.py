"""The configuration's keys as the small dataclasses that the step, drafters and targets take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from MaxDraft import sharding
from MaxDraft.drafts.drafter import Drafter, DrafterOptions, LossConfig
from MaxDraft.drafts.training_pass import RolloutConfig
from MaxDraft.pyconfig import Config, ConfigError
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.feature_source import OnlineTarget
from MaxDraft.train_step import StepSpec


def drafter_options(config: Config) -> DrafterOptions:
    """What the configuration asks of a drafter."""
    return DrafterOptions(
        draft_vocab_size=config.draft_vocab_size,
        intermediate_size=config.draft_intermediate_size,
        num_attention_heads=config.draft_num_attention_heads,
        num_key_value_heads=config.draft_num_key_value_heads,
        head_dim=config.draft_head_dim,
        fc_norm=config.draft_fc_norm,
        norm_output=config.draft_norm_output,
    )


def loss_config(config: Config) -> LossConfig:
    """Which positions train, and what their loss is."""
    return LossConfig(
        ttt_length=config.ttt_length,
        loss=config.loss,
        alignment=config.loss_alignment,
        denominator=config.loss_denominator,
        decay=config.ttt_loss_decay,
    )


def step_spec(
    config: Config,
    target: DecoderDims,
    captured_layers: tuple[int, ...],
    drafter: Drafter,
    mesh: Mesh,
) -> StepSpec:
    """The step that the configuration describes, on a target that is run."""
    kernel = attention_kernel(config, mesh)
    return StepSpec(
        drafter=drafter,
        source=OnlineTarget(
            dims=target,
            captured_layers=captured_layers,
            dtype=jnp.dtype(config.dtype),
            weight_dtype=jnp.dtype(config.weight_dtype),
            attention_block=config.attention_block_size,
            attention_kernel=kernel,
            vocab_block=config.vocab_block_size,
        ),
        loss=loss_config(config),
        rollout=RolloutConfig(config.rollout_block_size, config.attention_block_size, kernel),
        mesh=mesh,
        rules=config.logical_axis_rules,
    )


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that ici_* and dcn_*_parallelism ask for; devices: those of an absent machine."""
    return sharding.make_mesh(
        config.mesh_axes,
        [getattr(config, f"ici_{axis}_parallelism") for axis in config.mesh_axes],
        [getattr(config, f"dcn_{axis}_parallelism") for axis in config.mesh_axes],
        devices,
    )


def attention_kernel(config: Config, mesh: Mesh) -> str:
    """-> one of attention.IMPLEMENTATIONS; ConfigError where the mesh's devices have no such."""
    if config.attention == "blockwise":
        return "xla"
    platform = mesh.devices.flat[0].platform
    if platform not in ("tpu", "gpu"):
        raise ConfigError(
            f"attention=pallas: these kernels are a TPU's or a GPU's, and the devices are "
            f"of platform {platform}; write attention=blockwise"
        )
    return platform
