"""The training step of a configuration with random weights and tokens: no checkpoint, no data.

Only shapes, the mesh and the keys decide what such a step costs, so nothing is read but the
configuration, and nothing but jax, optax and pyyaml is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft import compile_step
from MaxDraft.compile_step import TrainingPrograms
from MaxDraft.drafts import registry as drafters
from MaxDraft.input_pipeline.synthetic import conversations, whole_rows
from MaxDraft.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from MaxDraft.pyconfig import Config, ConfigError
from MaxDraft.run.spec import drafter_options, make_mesh, step_spec
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.model_file import dims_from_target_config
from MaxDraft.tiny_target.recipe import Recipe, hf_config
from MaxDraft.train_step import FrozenParams, StepSpec, TrainState

_SCHEDULE_STEPS = 1000  # of the learning rate's schedule; it decides no shape and no time


@dataclasses.dataclass(frozen=True)
class SyntheticStep:
    """A step that can be compiled, and run once weights are drawn."""

    name: str
    config: Config
    target: DecoderDims
    spec: StepSpec
    programs: TrainingPrograms
    tokens: str  # "all" or "chats"
    batch: Mapping[str, np.ndarray]  # int32 [A, B, T]
    supervised: np.ndarray  # bool [A, B, T]: positions that some step of the rollout supervises

    def abstract_arguments(self) -> tuple[TrainState, FrozenParams, dict[str, Any]]:
        """Shapes, dtypes and shardings of what the step takes: state, frozen parameters, batch."""
        return (
            self.programs.abstract_state,
            compile_step.abstract_frozen(self.spec, self.spec.source.params_table()),
            compile_step.abstract_batch(self.spec, *self.supervised.shape),
        )

    def precision(self) -> AbstractContextManager[None]:
        """The context in which its programs are traced."""
        return jax.default_matmul_precision(self.config.matmul_precision)


def open_synthetic_step(
    name: str,
    config: Config,
    tokens: str = "all",
    devices: Sequence[jax.Device] | None = None,
) -> SyntheticStep:
    """Makes the step's functions; nothing is compiled yet.

    Args:
      name: how results call it.
      tokens: "all", one document a row that the assistant wrote; or "chats", packed conversations
        with ShareGPT's mean lengths.
      devices: those to compile for; None: those that are there.

    Raises:
      UserError: the configuration's dimensions are not known or do not fit each other.
    """
    target = target_dims(config)
    kind = drafters.drafter_class(config.drafter)
    drafter = kind.from_options(drafter_options(config), target)
    captured_layers = kind.captured_layers(config.target_layer_ids, target.num_layers)
    mesh = make_mesh(config, devices)
    spec = step_spec(config, target, captured_layers, drafter, mesh)
    settings = OptimizerConfig.from_config(config)
    schedule = learning_rate_schedule(settings, _SCHEDULE_STEPS)
    optimizer = make_optimizer(settings, schedule, drafter.params_table())
    make_tokens = {"all": whole_rows, "chats": conversations}[tokens]
    rows = config.gradient_accumulation_steps, config.per_device_batch_size * mesh.size
    batch = make_tokens(*rows, config.max_target_length, target.vocab_size)
    return SyntheticStep(
        name=name,
        config=config,
        target=target,
        spec=spec,
        programs=compile_step.training_programs(
            spec, optimizer, schedule, config.init_weights_seed
        ),
        tokens=tokens,
        batch=batch,
        supervised=_supervised(spec, batch),
    )


def target_dims(config: Config) -> DecoderDims:
    """Dimensions of the target that a model file was written for.

    Raises:
      ConfigError: the model file names no target_config.
    """
    fields = dict(config.target_config)
    if not fields and config.model_name == "tiny":
        recipe = Recipe()
        fields = hf_config(recipe, recipe.vocab_size)
    if not fields:
        raise ConfigError(
            f"model_name={config.model_name} has no target_config; name a model of "
            f"configs/models/ that has one, or give target_config='{{model_type: ..., ...}}'"
        )
    return dims_from_target_config(fields)


def _supervised(spec: StepSpec, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [A, B, T]: positions that some step supervises; ConfigError if there is none."""
    shape = batch["turn_ids"].shape
    turn_ids, segment_ids = (
        jnp.asarray(batch[name].reshape(-1, shape[-1])) for name in ("turn_ids", "segment_ids")
    )
    mask = spec.drafter.loss_mask(turn_ids, segment_ids, spec.loss)
    supervised = np.asarray(mask.any(0)).reshape(shape)
    if not supervised.any():
        raise ConfigError(
            f"no position of these tokens is supervised: max_target_length={shape[-1]} is too "
            f"short for them; give a longer one"
        )
    return supervised
