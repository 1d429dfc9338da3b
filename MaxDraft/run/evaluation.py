"""Measures the head of a run: teacher-forced metrics, and real speculative decoding.

evaluation.json holds the whole result with its settings; report.txt is made from that file alone,
so both always tell of the same evaluation, the last one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft import distributed, sharding, storage
from MaxDraft.decoding.drafter import BoundDrafter
from MaxDraft.decoding.measure import measure
from MaxDraft.decoding.state import DecodeParams, DecodeSpec
from MaxDraft.decoding.target_model import TargetModel
from MaxDraft.drafts import metrics
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.metric_logger import say
from MaxDraft.report import text as report
from MaxDraft.run.training_run import TrainingRun
from MaxDraft.train_step import FrozenParams

FILE = "evaluation.json"


def evaluate(run: TrainingRun, step: int, params: Tree, frozen: FrozenParams) -> dict[str, Any]:
    """Measures the head of optimizer step `step`; writes evaluation.json and report.txt."""
    config = run.config
    say(f"\nevaluating the head of step {step}")
    result = {"step": step} | held_out_metrics(run, params, frozen)
    prompts = run.data.prompts(run.target.dims.max_length)
    result |= decode(run, params, frozen, prompts)
    result["run"] = {
        "run_name": config.run_name,
        "run_directory": str(config.run_directory),
        "model_name": config.model_name,
        "drafter": run.drafter.kind,
        "target_path": str(run.target.path),
        "target_layer_ids": list(run.target.captured_layers),
        "total_steps": run.total_steps,
        "export_path": str(config.export_directory),
    }
    result["settings"] = {
        "draft_steps": config.decode_draft_steps,
        "recurrent_position_offset": config.decode_recurrent_position_offset,
        "max_new_tokens": config.decode_max_new_tokens,
        "batch_size": config.decode_batch_size,
        "dtype": config.dtype,
        "devices": f"{run.mesh.size} x {jax.devices()[0].device_kind}",
    }
    if distributed.is_main_process():
        path = config.run_directory / FILE
        storage.write_json(path, result)
        storage.write_text(config.run_directory / report.FILE, report.of_result(result))
        say(f"{report.evaluation_table(result)}\nwritten to {path}")
    return result


def held_out_metrics(
    run: TrainingRun, params: Tree, frozen: FrozenParams, num_batches: int = -1
) -> dict[str, Any]:
    """Teacher-forced metrics pooled over held-out batches, all where num_batches is -1."""
    found = [
        run.evaluation_step(params, frozen, batch) for batch in run.held_out_batches(num_batches)
    ]
    pooled = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *jax.device_get(found))
    return metrics.finish(pooled, run.drafter.step_weights(run.spec.loss))


def decode(
    run: TrainingRun, params: Tree, frozen: FrozenParams, prompts: list[list[int]]
) -> dict[str, Any]:
    """Real decoding of `prompts`, split over all devices of the mesh."""
    config, rules = run.config, run.config.logical_axis_rules
    table = run.drafter.params_table()
    untrained = jax.jit(
        lambda: parameters.initialize(table, config.init_weights_seed),
        out_shardings=parameters.shardings(table, run.mesh, rules),
    )()
    if not run.drafter.trains_lm_head:
        lm_head = run.spec.source.teacher_lm_head(frozen.source, frozen.draft_to_target)
        params, untrained = ({**head, "lm_head": lm_head} for head in (params, untrained))
    spec = DecodeSpec(
        target=TargetModel(run.target.dims, run.target.captured_layers, jnp.dtype(config.dtype)),
        drafter=BoundDrafter(run.drafter.decode_functions, run.drafter.dims),
        num_draft_tokens=config.decode_draft_steps,
        max_new_tokens=config.decode_max_new_tokens,
        stop_ids=run.stop_ids,
        temperature=config.decode_temperature,
        recurrent_position_offset=config.decode_recurrent_position_offset,
    )
    with sharding.axis_rules(run.mesh, rules):
        return measure(
            spec,
            DecodeParams(frozen.source, params, frozen.draft_to_target),
            untrained,
            prompts,
            config.decode_batch_size * run.mesh.size,
            say,
        )
