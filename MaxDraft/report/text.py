"""What a run says of its result: text made from evaluation.json alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

FILE = "report.txt"

Result = Mapping[str, Any]  # of evaluation.json


def of_result(result: Result) -> str:
    """report.txt: what was trained, how good it is, and what to type next."""
    run, settings, speed = result["run"], result["settings"], result["tokens_per_second"]
    folder, name = run["run_directory"].rsplit("/", 1)
    lines = [
        f"MaxDraft: run {run['run_name']}",
        f"  trained     drafter {run['drafter']} for {run['target_path']} (model_name="
        f"{run['model_name']}; keys in config.yml), {run['total_steps']} steps; this is the head "
        f"of step {result['step']}",
        f"  accept_length {result['accept_length']:.2f} tokens per verify step, greedy, "
        f"{settings['draft_steps']} draft steps, {result['prompts']} held-out prompts",
        f"    as engines count: {result['accept_length_engine']:.2f}; an untrained head: "
        f"{result['accept_length_untrained']:.2f}",
    ]
    if "sampled" in result:
        sampled = result["sampled"]
        lines.append(
            f"    at temperature {sampled['temperature']:g}: {sampled['accept_length']:.2f}"
        )
    where = f"run_name={shlex.quote(name)} base_output_directory={shlex.quote(folder)}"
    lines += [
        f"  lossless    {str(result['lossless']).lower()}: greedy replies compared with plain ones",
        f"  speedup     {result['speedup']:.2f} on this machine ({speed['plain']:.0f} -> "
        f"{speed['speculative']:.0f} tokens per second)",
        f"  export      {run['export_path']}",
        f"  evaluation  {run['run_directory']}/evaluation.json",
        "Next:",
        f"  .venv/bin/python3 MaxDraft/evaluate.py configs/base.yml {where} decode_draft_steps=5",
        "  .venv/bin/python3 MaxDraft/train.py configs/base.yml model_name=llama3.1-8b "
        "target_path=FOLDER grain_train_files=FILE.jsonl",
    ]
    return "\n".join(lines) + "\n"


def evaluation_table(result: Result) -> str:
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
