"""Measures the training step of any model file on any mesh, with random weights and tokens.

    python3 MaxDraft/benchmark.py configs/base.yml
    python3 MaxDraft/benchmark.py configs/base.yml model_name=llama3.1-8b per_device_batch_size=2
    python3 MaxDraft/benchmark.py configs/base.yml model_name=qwen3-8b --compile_only
    python3 MaxDraft/benchmark.py configs/base.yml model_name=qwen3-8b \
        --compare "rollout_block_size=1024"
    JAX_PLATFORMS=cpu python3 MaxDraft/benchmark.py configs/base.yml model_name=qwen3-8b \
        --topology v5e:2x4

The target's dimensions are the model file's target_config, or those of the embedded target; no
checkpoint, tokenizer or data is read, and nothing but jax, optax and pyyaml imported.

    --tokens all      one document a row, all of it the assistant's: every position is supervised
             chats    packed conversations with ShareGPT's mean lengths
    --steps N         timed steps (10), after one that is not timed
    --compile_only    no weights and no step: bytes and FLOPs of the compiled program
    --topology NAME   compiles for devices that need not be there: a TPU slice (v5e:2x4, v5p:2x2x1,
                      v6e:2x2) or the GPUs of one host (h100:1, h200:8); where DEVICE=tpu or
                      DEVICE=cuda bash setup.sh has installed their compiler
    --compare "K=V .."  the same with these keys besides; steps alternate, so that their ratio
                      means something on a machine that does other work as well
    --profile FOLDER  a trace of two more steps, for XProf or Perfetto
    --json FILE       writes all numbers
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
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

from MaxDraft import pyconfig
from MaxDraft.cost import attention_pairs, step_cost
from MaxDraft.cost.topologies import PEAK_FLOPS, devices_of
from MaxDraft.errors import run_main
from MaxDraft.input_pipeline.synthetic import document_lengths
from MaxDraft.report.step_cost import table
from MaxDraft.run.step_timing import RunningStep, matmul_peak
from MaxDraft.run.synthetic_step import SyntheticStep, open_synthetic_step

Result = dict[str, Any]


def compile_and_count(step: SyntheticStep) -> tuple[Any, Result]:
    """-> the compiled step; its bytes, positions and FLOPs."""
    config, mesh, shapes = step.config, step.spec.mesh, step.abstract_arguments()
    with step.precision():
        compiled, result = step_cost.compile_program(step.programs.train, shapes)
    result |= step_cost.position_counts(
        step.batch["segment_ids"],
        step.supervised,
        position_block=config.rollout_block_size,
        devices=mesh.size,
    )
    not_measured = " (keep_quantized is not measured)"
    result |= {
        "setting": step.name,
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": dict(mesh.shape),
        "weights": config.weight_dtype
        + (not_measured if config.target_quantization == "keep_quantized" else ""),
        "tokens_kind": step.tokens,
        "model_flops": step_cost.model_flops(
            step.target,
            step.spec.drafter,
            step.spec.num_steps,
            document_lengths(step.batch["segment_ids"]),
            result["supervised_positions"],
        ),
    }
    with step.precision():
        result |= step_cost.program_flops(step.programs.train, shapes, compiled, mesh)
    if config.attention == "blockwise":  # the kernels choose blocks of their own
        result["attention_pairs"] = _attention_pairs(step)
    return compiled, result


def _attention_pairs(step: SyntheticStep) -> dict[str, float]:
    config, mesh = step.config, step.spec.mesh
    target_axes = dict(config.logical_axis_rules)["target_batch"]
    return attention_pairs.computed_over_visible(
        step.batch["segment_ids"],
        step.supervised,
        position_block=config.rollout_block_size,
        attention_block=config.attention_block_size,
        devices=mesh.size,
        target_shards=math.prod(mesh.shape[axis] for axis in target_axes),
    )


def measure(
    steps: Sequence[SyntheticStep],
    compiled: Sequence[Any],
    results: Sequence[Result],
    repeats: int,
    profile: str = "",
) -> list[float]:
    """Runs the steps in turn and adds their times to the results.

    -> seconds of the last step by those of the first, of each turn.
    """
    running: list[RunningStep] = []
    for step, program in zip(steps, compiled, strict=True):
        running.append(RunningStep(step, program, running[0] if running else None))
    for one in running:
        one.run()  # not timed
    seconds = np.array([[one.run() for one in running] for _ in range(repeats)])
    if profile:
        with jax.profiler.trace(profile):
            for one in 2 * running:
                one.run()
    for one, of_one, result in zip(running, seconds.T, results, strict=True):
        result |= _rates(one, of_one, result)
        with one.step.precision():
            result["breakdown"] = one.breakdown(max(3, repeats // 2), result["computed_positions"])
    return (seconds[:, -1] / seconds[:, 0]).tolist()


def _rates(running: RunningStep, seconds: np.ndarray, result: Result) -> Result:
    """Quartiles of the step's seconds; tokens and model FLOPs a second and device."""
    step, mesh = running.step, running.step.spec.mesh
    median = float(np.median(seconds))
    flops_per_second = sum(result["model_flops"].values()) / median / mesh.size
    with step.precision():
        peak = matmul_peak(jnp.dtype(step.config.dtype))
    rates = {
        "step_seconds": [float(x) for x in np.quantile(seconds, (0.25, 0.5, 0.75))],
        "tokens_per_second_per_device": result["tokens"] / median / mesh.size,
        "matmul_peak": peak,
        "mfu_of_measured": flops_per_second / peak,
    }
    device_kind = mesh.devices.flat[0].device_kind
    if device_kind in PEAK_FLOPS and step.config.dtype == "bfloat16":
        rates["mfu"] = flops_per_second / PEAK_FLOPS[device_kind]
    return rates


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """-> flags; configuration file and keys. Exits with a message where flags are wrong."""
    parser = argparse.ArgumentParser(prog="benchmark.py", allow_abbrev=False, add_help=False)
    parser.add_argument("--tokens", choices=("all", "chats"), default="all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile_only", action="store_true")
    parser.add_argument("--topology", default="")
    parser.add_argument("--compare", type=shlex.split)
    parser.add_argument("--json", default="")
    parser.add_argument("--profile", default="")
    flags, keys = parser.parse_known_args(argv[1:])
    flags.compile_only |= bool(flags.topology)
    json_file = Path(flags.json).absolute()
    if flags.steps < 1:
        parser.error("--steps must be 1 or more")
    if flags.json and not json_file.parent.is_dir():
        parser.error(f"--json: there is no folder {json_file.parent}; make it, or name another")
    if flags.json and json_file.is_dir():
        parser.error(f"--json: {flags.json} is a folder; name a file")
    if flags.profile and Path(flags.profile).is_file():
        parser.error(f"--profile: {flags.profile} is a file; name a folder")
    if flags.compare == []:
        parser.error("--compare: give the keys that the second setting has besides")
    if flags.compile_only and flags.profile:
        parser.error("--profile: nothing is run where a step is only compiled")
    return flags, keys


def main(argv: Sequence[str]) -> int:
    flags, keys = parse(argv)
    devices = devices_of(flags.topology) if flags.topology else None
    variants = [(" ".join(keys[1:]) or "defaults", keys)]
    if flags.compare:
        replaced = {other.split("=")[0] for other in flags.compare}
        unchanged = [key for key in keys if key.split("=")[0] not in replaced]
        variants.append((" ".join(flags.compare), [*unchanged, *flags.compare]))
    steps = [
        open_synthetic_step(
            name, pyconfig.initialize([argv[0], *keys], reads_files=False), flags.tokens, devices
        )
        for name, keys in variants
    ]
    compiled, results = zip(*(compile_and_count(step) for step in steps), strict=True)
    ratios: list[float] = []
    if not flags.compile_only:
        ratios = measure(steps, compiled, results, flags.steps, flags.profile)
    print("\n\n".join(table(result) for result in results), flush=True)
    if len(steps) > 1 and ratios:
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(f"\nsecond / first: {median:.3f} median of pairs, quartiles {low:.3f} to {high:.3f}")
    if flags.json:
        numbers = {"settings": results, "ratios": ratios}
        Path(flags.json).write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
