"""Measures a trained head: teacher-forced metrics, and real speculative decoding.

    python3 MaxDraft/evaluate.py configs/base.yml run_name=q3 base_output_directory=/runs

Reads the run's own configuration; further key=value go on top. Writes <run>/evaluation.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # importing this file changes nothing
    # The repository's root, not this folder: no file in it may shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from MaxDraft.errors import exit_on_signals

    exit_on_signals()

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft import pyconfig, sharding, storage
from MaxDraft.decoding.drafter import BoundDrafter
from MaxDraft.decoding.measure import measure
from MaxDraft.decoding.state import DecodeParams, DecodeSpec
from MaxDraft.decoding.target_model import TargetModel
from MaxDraft.drafts import metrics
from MaxDraft.errors import run_main
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.metric_logger import say
from MaxDraft.run import training_run
from MaxDraft.run.training_run import TrainingRun
from MaxDraft.train_step import FrozenParams

FILE = "evaluation.json"


def main(argv: Sequence[str]) -> int:
    run = training_run.open_for_evaluation(pyconfig.initialize(argv, from_run=True))
    step, params, vocabulary = run.restore_head()
    frozen = training_run.load_frozen(run, vocabulary)
    evaluate(run, step, params, frozen)
    return 0


def evaluate(run: TrainingRun, step: int, params: Tree, frozen: FrozenParams) -> dict[str, Any]:
    """Measures the head of optimizer step `step`; writes evaluation.json and prints its table."""
    config = run.config
    say(f"\nevaluating the head of step {step}")
    result = {"step": step} | held_out_metrics(run, params, frozen)
    prompts = run.data.prompts(run.target.dims.max_length)
    result |= decode(run, params, frozen, prompts)
    result["settings"] = {
        "draft_steps": config.decode_draft_steps,
        "recurrent_position_offset": config.decode_recurrent_position_offset,
        "max_new_tokens": config.decode_max_new_tokens,
        "batch_size": config.decode_batch_size,
        "dtype": config.dtype,
        "target_layer_ids": list(run.target.captured_layers),
        "devices": f"{run.mesh.size} x {jax.devices()[0].device_kind}",
    }
    if jax.process_index() == 0:
        path = config.run_directory / FILE
        storage.write_json(path, result)
        say(f"{table(result)}\nwritten to {path}")
    return result


def held_out_metrics(
    run: TrainingRun, params: Tree, frozen: FrozenParams, num_batches: int = -1
) -> dict[str, Any]:
    """Teacher-forced metrics pooled over held-out batches, all where num_batches is -1."""
    found = [
        run.evaluation_step(params, frozen, batch) for batch in run.held_out_batches(num_batches)
    ]
    pooled = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *jax.device_get(found))
    return metrics.finish(pooled, run.config.ttt_loss_decay)


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


def table(result: dict[str, Any]) -> str:
    """evaluation.json for people."""
    lines = ["", "step k  acc_k   cond_acc_k  alpha_k     (teacher-forced, held-out rows)"]
    for k, row in enumerate(zip(result["acc"], result["cond_acc"], result["alpha"], strict=True)):
        lines.append(f"{k:6}  {row[0]:.3f}   {row[1]:.3f}       {row[2]:.3f}")
    chain = result["settings"]["draft_steps"]
    speed = result["tokens_per_second"]
    lines += [
        f"sim_accept_length  {result['sim_accept_length']:.2f}  (from cond_acc, chain of "
        f"{len(result['acc'])} drafts)",
        f"accept_length      {result['accept_length']:.2f}  (greedy, chain of {chain} drafts: "
        f"tokens per verify step, {result['prompts']} prompts, {result['reply_tokens']} tokens)",
        f"  as engines count {result['accept_length_engine']:.2f}  (with drafts accepted past "
        f"the end of a reply)",
        f"  untrained head   {result['accept_length_untrained']:.2f}",
    ]
    if "sampled" in result:
        sampled = result["sampled"]
        lines.append(f"  temperature {sampled['temperature']:<4g} {sampled['accept_length']:.2f}")
    lines += [
        f"lossless           {str(result['lossless']).lower()}  (greedy replies equal to plain "
        f"greedy ones; {len(result['unequal_replies'])} of {result['prompts']} differ)",
        f"tokens per second  {speed['plain']:.1f} plain, {speed['speculative']:.1f} speculative: "
        f"speedup {result['speedup']:.2f}",
        f"distinct 4-grams   {result['distinct_4gram_share']:.2f} within replies (1: none repeats "
        f"itself), {result['distinct_4gram_share_of_all_replies']:.2f} over all replies together",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
