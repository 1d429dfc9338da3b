"""The parts of gpu_check.sh that are no verb of MaxDraft.

gpu_check.py device FILE                     what is here
gpu_check.py equality FILE                   attention against dense attention
gpu_check.py largest_batch FILE CONFIG K=V.. rows of a batch that fit beside the weights
gpu_check.py report FOLDER                   FOLDER/*.json -> result.json, table.txt
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":  # the repository's root, not this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft import pyconfig
from MaxDraft.cost.step_cost import compile_program
from MaxDraft.layers import attention
from MaxDraft.layers.attention import packed_attention
from MaxDraft.layers.attention_keys import Scoring
from MaxDraft.report.step_cost import table
from MaxDraft.run.step_timing import RunningStep
from MaxDraft.run.synthetic_step import SyntheticStep, open_synthetic_step

# A batch on a CPU is held against this, as if the machine were a chip.
CPU_MEMORY = 256 * 2**20
SCORINGS = {"causal": Scoring(), "window and softcap": Scoring(window=100, softcap=30.0)}


def device() -> dict[str, Any]:
    """The devices that jax has."""
    devices = jax.devices()
    kind, platform = devices[0].device_kind, devices[0].platform
    versions = {"jax": jax.__version__}
    return {"platform": platform, "device_kind": kind, "devices": len(devices)} | versions


# -------------------------------------------------------------------------------------- equality
def equality() -> dict[str, Any]:
    """Largest difference of each implementation to dense attention, by output and gradient.

    Relative to the largest number of the dense result, which is computed in float32. The tolerance
    follows from the arithmetic: float32 sums over T keys, each of which may round; in bfloat16 the
    softmax's weights, the gradient of the scores, the incoming gradient and the result are rounded
    once each, and everything between is float32.
    """
    platform = jax.devices()[0].platform
    names = ["xla"] + {"cpu": ["tpu", "gpu"], "tpu": ["tpu"], "gpu": ["gpu"]}[platform]
    if platform == "cpu":
        for name in names[1:]:
            attention.IMPLEMENTATIONS[name] = _interpreted(attention.IMPLEMENTATIONS[name])
    T = 96 if platform == "cpu" else 1024
    tolerances = {
        "float32": T * float(jnp.finfo("float32").eps),
        "bfloat16": 4 * float(jnp.finfo("bfloat16").eps),
    }
    comparisons = []
    for dtype, tolerance in tolerances.items():
        arrays = _random_arrays(T, dtype)
        for scoring_name, scoring in SCORINGS.items():
            with jax.default_matmul_precision("highest"):
                wide = [x.astype(jnp.float32) if x.dtype == dtype else x for x in arrays]
                expected = _with_gradients(functools.partial(_dense, scoring=scoring), *wide)
            for name in names:
                one = {"implementation": name, "dtype": dtype, "scoring": scoring_name}
                comparisons.append(one | _compare(name, scoring, arrays, expected, tolerance))
    return {"length": T, "comparisons": comparisons}


def _compare(
    name: str,
    scoring: Scoring,
    arrays: Sequence[jax.Array],
    expected: Sequence[np.ndarray],
    tolerance: float,
) -> dict[str, Any]:
    attend = functools.partial(packed_attention, block=128, scoring=scoring, kernel=name)
    # Products of bfloat16 have one precision; a TPU's kernels refuse to be asked for another.
    precision = "highest" if arrays[0].dtype == jnp.float32 else "default"
    try:
        with jax.default_matmul_precision(precision):
            computed = _with_gradients(attend, *arrays)
    except Exception as error:  # a kernel that does not compile; the others are compared still
        return {"failure": f"{type(error).__name__}: {error}", "equal": False}
    pairs = zip(("out", "d_q", "d_k", "d_v"), computed, expected, strict=True)
    errors = {key: float(np.abs(x - y).max() / np.abs(y).max()) for key, x, y in pairs}
    equal = all(error <= tolerance for error in errors.values())  # NaN is not
    return {"errors": errors, "tolerance": tolerance, "equal": equal}


def _interpreted(kernel: ModuleType) -> Any:
    """The kernel as jax operations, for a platform that has none."""

    class Interpreted:
        forward = staticmethod(functools.partial(kernel.forward, interpret=True))
        backward = staticmethod(functools.partial(kernel.backward, interpret=True))

    return Interpreted


def _random_arrays(T: int, dtype: str) -> list[jax.Array]:
    """q [2, T, 8, 64], k and v [2, T, 2, 64], segment_ids [2, T], d_out as q."""
    rng = np.random.default_rng(0)
    heads = (8, 2, 2, 8)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, T, count, 64)), dtype) for count in heads)
    segment_ids = np.sort(rng.integers(1, 5, (2, T)), axis=1)
    return [q, k, v, jnp.asarray(segment_ids, jnp.int32), d_out]


def _dense(q, k, v, segment_ids, scoring: Scoring) -> jax.Array:
    """Attention with all scores at once."""
    group, index = q.shape[2] // k.shape[2], jnp.arange(q.shape[1])
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k) * q.shape[-1] ** -0.5
    if scoring.softcap:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    behind = index[:, None] - index
    visible = (segment_ids[:, :, None] == segment_ids[:, None]) & (behind >= 0)
    if scoring.window:
        visible &= behind < scoring.window
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnqk,bknd->bqnd", weights, v)


def _with_gradients(attend, q, k, v, segment_ids, d_out) -> list[np.ndarray]:
    @jax.jit
    def run(q, k, v):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)
        return out, *pull_back(d_out.astype(out.dtype))

    return [np.asarray(x, np.float32) for x in run(q, k, v)]


# --------------------------------------------------------------------------------- largest batch
def largest_batch(argv: Sequence[str]) -> dict[str, Any]:
    """Rows of a device's batch that fit, as the compiler counts bytes, and a step with as many.

    Bytes grow in proportion to the rows, so two compiled programs say how many fit; a step is then
    run with them, and with a tenth less as long as the memory does not suffice.
    """
    few, many = (1, 3) if jax.devices()[0].platform == "cpu" else (2, 8)
    used = {rows: _bytes(_step(argv, rows)) for rows in (few, many)}
    of_a_row = (used[many] - used[few]) / (many - few)
    limit = _memory()
    predicted = int(few + (limit - used[few]) / of_a_row)
    result = {
        "row_length": _step(argv, few).config.max_target_length,
        "bytes_limit": limit,
        "bytes_of_a_row": of_a_row,
        "rows_predicted": predicted,
    }
    rows = predicted
    while rows > 0:
        try:
            return result | {"rows_run": rows, "step_seconds": _second_step(_step(argv, rows))}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        rows = int(0.9 * rows)
    return result | {"rows_run": 0}


def _second_step(step: SyntheticStep) -> float:
    """Seconds of a step, after one that is not timed."""
    with step.precision():
        program = step.programs.train.lower(*step.abstract_arguments()).compile()
    running = RunningStep(step, program)
    running.run()
    return running.run()


def _step(argv: Sequence[str], rows: int) -> SyntheticStep:
    keys = [*argv, f"per_device_batch_size={rows}"]
    config = pyconfig.initialize(["gpu_check.py", *keys], reads_files=False)
    return open_synthetic_step(f"{rows} rows", config)


def _bytes(step: SyntheticStep) -> float:
    """Of one device while the step runs."""
    with step.precision():
        _, of_step = compile_program(step.programs.train, step.abstract_arguments())
    return sum(of_step[f"{kind}_bytes"] for kind in ("temporary", "argument", "output"))


def _memory() -> int:
    """Bytes that jax may take of a device."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", CPU_MEMORY)


# ---------------------------------------------------------------------------------------- report
def report(folder: Path) -> int:
    """Puts the parts together; -> 0 where all parts ended and all comparisons are equal."""
    parts, failed = {}, {}
    for file in sorted(folder.glob("*.exit")):
        status = int(file.read_text(encoding="utf-8"))
        if status:
            reason = "time limit" if status in (124, 137) else f"exit status {status}"
            failed[file.stem] = f"{reason}; see {file.with_suffix('.log')}"
        else:
            parts[file.stem] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    lines = ["device           " + json.dumps(parts.get("device"))]
    comparisons = parts.get("equality", {}).get("comparisons", [])
    for one in comparisons:
        start = f"attention        {one['implementation']:<5}{one['dtype']:<10}{one['scoring']:<20}"
        if "failure" in one:
            lines.append(f"{start}FAILED: {one['failure'].splitlines()[0]}")
            continue
        lines.append(
            f"{start}largest error {max(one['errors'].values()):.1e} of {one['tolerance']:.1e} "
            f"allowed: {'equal' if one['equal'] else 'NOT EQUAL'}"
        )
    lines += [table(part["settings"][0]) for name, part in parts.items() if name[:5] == "step-"]
    if "largest_batch" in parts:
        batch = parts["largest_batch"]
        lines.append(
            f"largest batch    {batch['rows_run']} rows of {batch['row_length']:,} tokens a device "
            f"ran; {batch['rows_predicted']} by the compiler's bytes, in "
            f"{batch['bytes_limit'] / 2**30:.1f} GiB"
        )
    lines += [f"FAILED           {name}: {reason}" for name, reason in failed.items()]
    text = "\n".join(lines) + "\n"
    (folder / "table.txt").write_text(text, encoding="utf-8")
    result = json.dumps({"parts": parts, "failed": failed}, indent=2)
    (folder / "result.json").write_text(result, encoding="utf-8")
    print(text, end="")
    return 0 if not failed and all(one["equal"] for one in comparisons) else 1


def main(argv: Sequence[str]) -> int:
    match argv[1:]:
        case ["report", folder]:
            return report(Path(folder))
        case ["device", file]:
            result = device()
        case ["equality", file]:
            result = equality()
        case ["largest_batch", file, *keys]:
            result = largest_batch(keys)
        case _:
            print(__doc__)
            return 2
    Path(file).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
