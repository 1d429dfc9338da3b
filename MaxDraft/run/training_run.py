"""What the entry scripts share: from a Config to the parts of a run.

open_run    Config -> target, data, mesh, head, jitted programs, checkpoints
load_frozen target weights and draft vocabulary onto the devices
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import absl.logging
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from MaxDraft import distributed, pyconfig, sharding, storage
from MaxDraft.checkpointing import Checkpoints
from MaxDraft.convert.heads import load as head_import
from MaxDraft.convert.target import checkpoint as target_checkpoint
from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.drafts.eagle3.head import HeadDims
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.errors import UserError
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.metric_logger import say
from MaxDraft.pyconfig import Config
from MaxDraft.resume import ResumeError, check_same_config
from MaxDraft.run.data import RunData, open_data
from MaxDraft.run.target import (
    Target,
    open_target,
    saved_head_dims,
    stop_token_ids,
    target_table,
    wanted_head_dims,
    with_embedded_target,
)
from MaxDraft.targets.dims import TargetError
from MaxDraft.train_step import Batch, Frozen, Programs, make_programs


class TrainingError(UserError):
    """Training cannot go on."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, before any weight is loaded."""

    config: Config
    target: Target
    data: RunData | None
    mesh: Mesh
    head_dims: HeadDims
    total_steps: int
    programs: Programs
    checkpoints: Checkpoints

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: those of the target's configs, and of the chat template."""
        if not self.data.encoder.end_ids:
            raise TargetError(
                f"no token ends a reply: {self.target.path} names no eos_token_id, and the chat "
                f"template ends a turn with no special token"
            )
        return tuple(sorted(self.data.encoder.end_ids))

    def train_batches(self, batches_read: int) -> Iterator[Batch]:
        """Global batches [A, B, T] on the devices, from number `batches_read` on."""
        return self._on_devices(self.data.train_batches(batches_read))

    def held_out_batches(self, limit: int = -1) -> Iterator[Batch]:
        """Global batches [A, B, T] that hold every held-out row once; at most `limit`, -1: all."""
        return self._on_devices(self.data.held_out_batches(limit))

    def _on_devices(self, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[Batch]:
        micro_batches = self.config.gradient_accumulation_steps
        for batch in batches:
            yield {
                name: jax.make_array_from_process_local_data(
                    self.programs.batch_sharding, rows.reshape(micro_batches, -1, rows.shape[-1])
                )
                for name, rows in batch.items()
            }

    def restore_head(self) -> tuple[int, Tree, DraftVocabulary]:
        """-> (step, parameters, vocabulary) of the checkpoint that `run_checkpoint` names."""
        step, params, ids = self.checkpoints.restore_params(
            self.config.run_checkpoint, self.programs.abstract_state.params
        )
        return step, params, DraftVocabulary(ids, self.target.dims.vocab_size)


def open_run(config: Config, for_training: bool = False, with_data: bool = True) -> Run:
    """Opens what the config names, or raises what is wrong with it; loads no weight.

    for_training: the run begins or goes on; otherwise it exists, and its head's dimensions are
    those it was trained with.
    """
    start_jax(config)
    config = with_embedded_target(config)
    make_run_directory(config)
    if for_training:
        lock_run_directory(config)
    target = open_target(config)
    mesh = sharding.make_mesh(
        config.mesh_axes,
        [getattr(config, f"ici_{axis}_parallelism") for axis in config.mesh_axes],
        [getattr(config, f"dcn_{axis}_parallelism") for axis in config.mesh_axes],
    )
    data = None
    if with_data:
        data = open_data(
            config,
            vocab_size=target.dims.vocab_size,
            stop_token_ids=stop_token_ids(target),
            device_count=mesh.size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            log=say,
        )
    total_steps = data.total_steps if data else 1
    checkpoints = Checkpoints(config, say, read_only=not for_training)
    saved = checkpoints.saved_identity()
    if saved is None and not for_training:
        raise ResumeError(f"no readable checkpoint in {config.run_directory}; run train.py first")
    if saved is not None and saved["target"] != target.fingerprint:
        raise ResumeError(
            f"run {config.run_name} was begun with another target than the one in {target.path}; "
            f"give that one as target_path, or give another run_name"
        )
    # A run that has begun keeps the dimensions of its head, also where a warm start's folder is
    # gone; the keys they come from cannot change.
    head_dims = saved_head_dims(saved["head"]) if saved else wanted_head_dims(config, target.dims)
    if data:
        data.prompts(target.dims.max_length)  # or an error now, not after the training
        checkpoints.set_identity(
            {
                "target": target.fingerprint,
                # As it was saved: an older checkpoint may name the same fields otherwise.
                "head": saved["head"] if saved else _as_json(head_dims),
                "data": data.fingerprint,
                "rows per optimizer step": data.rows_per_step,
                "optimizer steps": total_steps,
            }
        )
    return Run(
        config=config,
        target=target,
        data=data,
        mesh=mesh,
        head_dims=head_dims,
        total_steps=total_steps,
        programs=make_programs(config, target.dims, head_dims, target.capture, mesh, total_steps),
        checkpoints=checkpoints,
    )


def _as_json(head_dims: HeadDims) -> Mapping[str, object]:
    return json.loads(json.dumps(dataclasses.asdict(head_dims)))


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


def make_run_directory(config: Config) -> None:
    """Makes <run>; ResumeError where it cannot be written or holds another run than this one."""
    folder = config.run_directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_text(folder / ".writable", "")
        storage.remove(folder / ".writable")
        config.export_directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResumeError(
            f"the run's folder {folder} or export_path cannot be written ({error.strerror}: "
            f"{error.filename}); give another base_output_directory or export_path"
        ) from error
    begun = any(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))
    if begun and (folder / pyconfig.SAVED_NAME).is_file():
        check_same_config(pyconfig.read_saved(folder), config)


def lock_run_directory(config: Config) -> None:
    """ResumeError where another process trains this run; held until this process ends."""
    if jax.process_index() > 0:
        return  # the processes of one run share its folder
    if not storage.lock_until_exit(config.run_directory / ".lock"):
        raise ResumeError(
            f"{config.run_directory} is being trained by another process; wait for it, stop it, or "
            f"give another run_name"
        )


def initial_head(run: Run) -> tuple[DraftVocabulary, Tree | None]:
    """Where a new run begins: the vocabulary of its data and no parameters, or a head's own."""
    path = run.config.load_parameters_path
    if not path:
        return run.data.select_vocabulary(run.head_dims.draft_vocab_size), None
    placement = parameters.shardings(
        eagle3.head_params(run.head_dims), run.mesh, run.config.logical_axis_rules
    )
    warm = head_import.load_head(
        Path(path).expanduser(), run.head_dims, run.target.capture, placement
    )
    say(f"warm start from {path}")
    return warm.vocabulary, warm.params


def vocabulary(run: Run, draft_to_target: np.ndarray) -> DraftVocabulary:
    """The draft vocabulary of a checkpoint."""
    return DraftVocabulary(draft_to_target, run.target.dims.vocab_size)


def load_frozen(run: Run, vocabulary: DraftVocabulary) -> Frozen:
    """The target's weights, each device reading its own slices, and the draft vocabulary."""
    config, target, mesh = run.config, run.target, run.mesh
    table = target_table(config, target, config.target_quantization == "keep_quantized")
    for line in target_checkpoint.unused_tensors(target.path, table):
        say(f"target, not used: {line}")
    placement = parameters.shardings(table, mesh, config.logical_axis_rules)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def replicate(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

    return Frozen(
        target=target_checkpoint.load_target(target.path, table, placement),
        draft_to_target=replicate(vocabulary.draft_to_target.astype(np.int32)),
    )
