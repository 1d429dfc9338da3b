"""What a run says of itself before it starts, aloud and in its folder.

config.yml              every key as it was resolved
data.json               what was read, left out, packed and covered
draft_vocabulary.json   the target ids that the head can draft
"""

from __future__ import annotations

import jax

from MaxDraft import distributed, pyconfig, storage
from MaxDraft.convert.target import checkpoint as target_checkpoint
from MaxDraft.convert.target.checkpoint import target_memory
from MaxDraft.convert.target.quantized_params import dequantized
from MaxDraft.cost import flops
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers import params as parameters
from MaxDraft.metric_logger import say
from MaxDraft.run.target import target_table
from MaxDraft.run.training_run import TrainingRun


def describe(run: TrainingRun, vocabulary: DraftVocabulary) -> None:
    """Prints what will be trained on what, and writes it beside the run."""
    config, target, drafter = run.config, run.target, run.drafter
    summary = run.data.summary(vocabulary)
    trained = parameters.count(drafter.params_table())
    frozen = parameters.count(run.spec.source.params_table())
    cost = flops.per_token(
        target.dims,
        drafter,
        run.spec.num_steps,
        config.max_target_length,
        run.data.supervised_share,
    )
    mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    say(
        f"\nsample of the training data, the assistant's tokens in brackets:\n{run.data.sample()}\n"
        f"\n{summary.text()}\n"
        f"target: {target.config['model_type']}, {frozen:,} parameters, outputs of layers "
        f"{list(target.captured_layers)} of 0..{target.dims.num_layers - 1}\n"
        f"target in memory: {_target_memory(run)}\n"
        f"drafter: {drafter.kind}, {trained:,} parameters, {run.spec.num_steps} draft steps\n"
        f"mesh: {run.mesh.size} {jax.devices()[0].device_kind} ({mesh}), {jax.process_count()} "
        f"process(es)\n"
        f"training: {run.total_steps} optimizer steps of {run.data.rows_per_step} rows of "
        f"{config.max_target_length} positions; model FLOPs per token "
        f"{sum(cost.values()) / 1e9:.3f} GFLOP\n"
        f"run folder: {config.run_directory}\n"
    )
    if distributed.is_main_process():
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
