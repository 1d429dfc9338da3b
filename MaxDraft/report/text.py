"""What a run says of itself before it starts and when it is done, aloud and in its folder.

config.yml        every key as it was resolved
data.json         what was read, left out, packed and covered
draft_vocabulary.json
report.txt        the result, and how to serve it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from MaxDraft import pyconfig, storage
from MaxDraft.convert.target import checkpoint as target_checkpoint
from MaxDraft.convert.target.checkpoint import target_memory
from MaxDraft.convert.target.quantized_params import dequantized
from MaxDraft.cost import flops
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers import params as parameters
from MaxDraft.metric_logger import say
from MaxDraft.run.target import target_table
from MaxDraft.run.training_run import TrainingRun
from MaxDraft.targets.table import decoder_params


def describe(run: TrainingRun, vocabulary: DraftVocabulary) -> None:
    """Prints what will be trained on what, and writes it beside the run."""
    config, target, drafter = run.config, run.target, run.drafter
    summary = run.data.summary(vocabulary)
    trained = parameters.count(drafter.params_table())
    frozen = parameters.count(decoder_params(target.dims, target.captured_layers))
    cost = flops.per_token(
        target.dims,
        drafter,
        config.ttt_length,
        config.max_target_length,
        run.data.supervised_share,
    )
    mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    say(
        f"\nsample of the training data, the assistant's tokens in brackets:\n{run.data.sample()}\n"
        f"\n{summary.text()}\n"
        f"target: {target.config['model_type']}, {frozen:,} parameters, features of layers "
        f"{list(target.captured_layers)} of 0..{target.dims.num_layers - 1}\n"
        f"target in memory: {_target_memory(run)}\n"
        f"drafter: {drafter.kind}, {trained:,} parameters, rollout of {config.ttt_length} steps\n"
        f"mesh: {run.mesh.size} {jax.devices()[0].device_kind} ({mesh}), {jax.process_count()} "
        f"process(es)\n"
        f"training: {run.total_steps} optimizer steps of {run.data.rows_per_step} rows of "
        f"{config.max_target_length} positions; model FLOPs per token "
        f"{sum(cost.values()) / 1e9:.3f} GFLOP\n"
        f"run folder: {config.run_directory}\n"
    )
    if jax.process_index() == 0:
        config.write(config.run_directory / pyconfig.SAVED_NAME)
        vocabulary.save(config.run_directory / "draft_vocabulary.json")
        storage.write_json(config.run_directory / "data.json", summary.as_dict())


def _target_memory(run: TrainingRun) -> str:
    """Of the target's weights, in both forms where its files are quantized."""
    tables = {
        form: target_table(run.config, run.target, form == "keep_quantized")
        for form in ("dequantize", "keep_quantized")
    }
    forms = {form: target_memory(table) / 1e9 for form, table in tables.items()}
    keep = run.config.target_quantization == "keep_quantized"
    now = f"{forms[run.config.target_quantization]:.3f} GB (1e9 bytes) in all"
    quantization = target_checkpoint.read_quantization(run.target.path)
    if not quantization:
        nothing = (
            "; the files hold nothing quantized, target_quantization=keep_quantized changes nothing"
        )
        return now + (nothing if keep else "")
    text = (
        f"{now}; the files hold {quantization}: target_quantization=dequantize takes "
        f"{forms['dequantize']:.3f} GB, keep_quantized {forms['keep_quantized']:.3f} GB"
    )
    others = dequantized(tables["keep_quantized"], target_checkpoint.open_weights(run.target.path))
    return text + (f"; dequantized all the same: {', '.join(others)}" if keep and others else "")


def finish(run: TrainingRun, result: dict[str, Any], export: Path) -> None:
    """Prints and writes the report of a finished run."""
    config, speed = run.config, result["tokens_per_second"]
    lines = [
        f"MaxDraft: run {config.run_name} is done",
        f"  trained     an {run.drafter.kind} head for {run.target.path} with the settings of "
        f"configs/models/{config.model_name}.yml, {run.total_steps} steps; this is the head of "
        f"step {result['step']}",
        f"  accept_length {result['accept_length']:.2f} tokens per verify step, greedy, "
        f"{config.decode_draft_steps} draft steps, {result['prompts']} held-out prompts",
        f"    an untrained head: {result['accept_length_untrained']:.2f}",
    ]
    if "sampled" in result:
        sampled = result["sampled"]
        lines.append(
            f"    at temperature {sampled['temperature']:g}: {sampled['accept_length']:.2f}"
        )
    lines += [
        f"  lossless    {str(result['lossless']).lower()}: greedy replies compared with plain ones",
        f"  speedup     {result['speedup']:.2f} on this machine ({speed['plain']:.0f} -> "
        f"{speed['speculative']:.0f} tokens per second)",
        f"  export      {export}",
        f"  evaluation  {config.run_directory / 'evaluation.json'}",
        "Next:",
        f"  .venv/bin/python3 MaxDraft/evaluate.py configs/base.yml run_name={config.run_name} "
        f"base_output_directory={config.base_output_directory} decode_draft_steps=5",
        "  .venv/bin/python3 MaxDraft/train.py configs/base.yml model_name=llama3.1-8b "
        "target_path=FOLDER grain_train_files=FILE.jsonl",
    ]
    text = "\n".join(lines)
    say(f"\n{text}")
    if jax.process_index() == 0:
        storage.write_text(config.run_directory / "report.txt", text + "\n")
