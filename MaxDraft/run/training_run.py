"""Opens a run from its Config, without weights; load_frozen and initial_head then load them.

open_for_training     a run that begins or goes on                      -> TrainingRun
open_for_evaluation   a run that has been trained, with its data        -> TrainingRun
open_for_export       a run that has been trained, without data         -> OpenedRun
load_frozen           the target's weights and draft vocabulary onto the devices
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from MaxDraft import compile_step, distributed, train_step
from MaxDraft.checkpointing import Checkpoints
from MaxDraft.compile_step import TrainingPrograms
from MaxDraft.convert.heads import load as head_import
from MaxDraft.convert.target import checkpoint as target_checkpoint
from MaxDraft.drafts import registry
from MaxDraft.drafts.drafter import Drafter
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.errors import UserError
from MaxDraft.input_pipeline.file_spec import parse_file_spec
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.metric_logger import say
from MaxDraft.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from MaxDraft.pyconfig import Config
from MaxDraft.resume import ResumeError
from MaxDraft.run.data import RunData, open_data
from MaxDraft.run.folder import check_export_directory, lock_run_directory, make_run_directory
from MaxDraft.run.spec import drafter_options, make_mesh, step_spec
from MaxDraft.run.target import (
    Target,
    open_target,
    stop_token_ids,
    target_table,
    with_embedded_target,
)
from MaxDraft.run.warm_start import with_captured_layers
from MaxDraft.targets.dims import TargetError
from MaxDraft.train_step import Batch, FrozenParams, Metrics, StepSpec


class TrainingError(UserError):
    """Training cannot go on."""


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """A run as its folder and its target say it."""

    config: Config
    target: Target
    drafter: Drafter
    spec: StepSpec
    checkpoints: Checkpoints

    @property
    def mesh(self) -> Mesh:
        return self.spec.mesh

    def restore_head(self) -> tuple[int, Tree, DraftVocabulary]:
        """-> (step, parameters, vocabulary) of the checkpoint that `run_checkpoint` names."""
        placement = train_step.param_shardings(self.spec)
        abstract = parameters.abstract(self.drafter.params_table(), placement)
        step, params, ids = self.checkpoints.restore_params(self.config.run_checkpoint, abstract)
        return step, params, self.vocabulary(ids)

    def vocabulary(self, draft_to_target: np.ndarray) -> DraftVocabulary:
        """The draft vocabulary of a checkpoint."""
        return DraftVocabulary(draft_to_target, self.target.dims.vocab_size)


@dataclasses.dataclass(frozen=True)
class TrainingRun(OpenedRun):
    """A run with what it learns from and is measured on."""

    data: RunData

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: those of the target's configs, and of the chat template."""
        return tuple(sorted(self.data.encoder.end_ids))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.data.total_steps

    @functools.cached_property
    def programs(self) -> TrainingPrograms:
        """The jitted training step; compiled when it is first called."""
        settings = OptimizerConfig.from_config(self.config)
        schedule = learning_rate_schedule(settings, self.total_steps)
        optimizer = make_optimizer(settings, schedule, self.drafter.params_table())
        return compile_step.training_programs(
            self.spec, optimizer, schedule, self.config.init_weights_seed
        )

    @functools.cached_property
    def evaluation_step(self) -> Callable[[Tree, FrozenParams, Batch], Metrics]:
        """The jitted evaluation step; compiled when it is first called."""
        return compile_step.evaluation_program(self.spec)

    def train_batches(self, batches_read: int) -> Iterator[Batch]:
        """Global batches [A, B, T] on the devices, from number `batches_read` on."""
        return self._on_devices(self.data.train_batches(batches_read))

    def held_out_batches(self, limit: int = -1) -> Iterator[Batch]:
        """Global batches [A, B, T] that hold every held-out row once; at most `limit`, -1: all."""
        return self._on_devices(self.data.held_out_batches(limit))

    def _on_devices(self, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[Batch]:
        micro_batches = self.config.gradient_accumulation_steps
        shardings = compile_step.batch_shardings(self.spec)
        for batch in batches:
            yield {
                name: jax.make_array_from_process_local_data(
                    sharding, batch[name].reshape(micro_batches, -1, *batch[name].shape[1:])
                )
                for name, sharding in shardings.items()
            }


def open_for_training(config: Config) -> TrainingRun:
    """A run that begins, or goes on from what its folder holds; nobody else may train it."""
    config = _prepared(config)
    lock_run_directory(config)
    check_export_directory(config)
    checkpoints = Checkpoints(config, say)
    return _with_data(_opened(config, checkpoints, checkpoints.saved_identity()))


def open_for_evaluation(config: Config) -> TrainingRun:
    """A run that has been trained, with its data."""
    return _with_data(open_for_export(config))


def open_for_export(config: Config) -> OpenedRun:
    """A run that has been trained; its data are not read. ResumeError where there is none."""
    config = _prepared(config)
    checkpoints = Checkpoints(config, say, read_only=True)
    saved = checkpoints.saved_identity()
    if saved is None:
        raise ResumeError(f"no readable checkpoint in {config.run_directory}; run train.py first")
    return _opened(config, checkpoints, saved)


def _prepared(config: Config) -> Config:
    # What is wrong with these is told before the embedded target is made, which takes minutes.
    registry.drafter_class(config.drafter)
    for files in filter(None, (config.grain_train_files, config.grain_eval_files)):
        parse_file_spec(files)
    config = with_captured_layers(config)
    start_jax(config)
    config = with_embedded_target(config)
    make_run_directory(config)
    return config


def _opened(config: Config, checkpoints: Checkpoints, saved: dict[str, Any] | None) -> OpenedRun:
    """saved: the identity that the run's checkpoints say; None: it begins."""
    kind = registry.drafter_class(config.drafter)
    target = open_target(config, kind)
    if saved is not None and saved["target"] != target.fingerprint:
        raise ResumeError(
            f"run {config.run_name} was begun with another target than the one in {target.path}; "
            f"give that one as target_path, or give another run_name"
        )
    # A run that has begun keeps the dimensions of its head, also where a warm start's folder is
    # gone; the keys they come from cannot change.
    if saved is not None:
        drafter = registry.from_identity(saved)
    else:
        drafter = kind.from_options(drafter_options(config), target.dims)
        if config.load_parameters_path:
            drafter = head_import.warm_drafter(
                Path(config.load_parameters_path).expanduser(), drafter
            )
    spec = step_spec(config, target.dims, target.captured_layers, drafter, make_mesh(config))
    return OpenedRun(config, target, drafter, spec, checkpoints)


def _with_data(run: OpenedRun) -> TrainingRun:
    data = open_data(
        run.config,
        vocab_size=run.target.dims.vocab_size,
        stop_token_ids=stop_token_ids(run.target),
        device_count=run.mesh.size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        log=say,
    )
    # What is asked for below and not there is an error now, not after the training.
    data.prompts(run.target.dims.max_length)
    if not data.encoder.end_ids:
        raise TargetError(
            f"no token ends a reply: {run.target.path} names no eos_token_id, and the chat "
            f"template ends a turn with no special token"
        )
    run.checkpoints.set_identity(
        {
            "target": run.target.fingerprint,
            **registry.identity(run.drafter),
            "data": data.fingerprint,
            "rows per optimizer step": data.rows_per_step,
            "optimizer steps": data.total_steps,
        }
    )
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return TrainingRun(**fields, data=data)


def start_jax(config: Config) -> None:
    """Settings of the process; on several processes, joins them. Before any other use of jax."""
    distributed.start(
        config.distributed_coordinator,
        config.distributed_num_processes,
        config.distributed_process_id,
        automatic=not config.skip_jax_distributed_system,
    )
    absl.logging.set_verbosity(absl.logging.FATAL)  # what Orbax logs is raised too, and told
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    if config.jax_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.jax_cache_dir).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def initial_head(run: TrainingRun) -> tuple[DraftVocabulary, Tree | None]:
    """Where a new run begins: the vocabulary of its data and no parameters, or a head's own."""
    path = run.config.load_parameters_path
    if not path:
        size = run.drafter.draft_vocab_size or run.target.dims.vocab_size
        return run.data.select_vocabulary(size), None
    warm = head_import.load_head(
        Path(path).expanduser(),
        run.drafter,
        run.target.captured_layers,
        train_step.param_shardings(run.spec),
        head_import.TargetFolder(run.target.path, run.target.dims),
    )
    say(f"warm start from {path}")
    return warm.vocabulary, warm.params


def load_frozen(run: OpenedRun, vocabulary: DraftVocabulary) -> FrozenParams:
    """The target's weights, each device reading its own slices, and the draft vocabulary."""
    config, target, mesh = run.config, run.target, run.mesh
    table = target_table(config, target, config.target_quantization == "keep_quantized")
    for line in target_checkpoint.unused_tensors(target.path, table):
        say(f"target, not used: {line}")
    placement = parameters.shardings(table, mesh, config.logical_axis_rules)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def replicate(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

    return FrozenParams(
        source=target_checkpoint.load_target(target.path, table, placement),
        draft_to_target=replicate(vocabulary.draft_to_target.astype(np.int32)),
    )
