"""Which serving engines can run an exported drafter with its target, and the command for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from MaxDraft.convert.engines import sglang, sglang_jax, tpu_inference, vllm
from MaxDraft.convert.engines.engine import NUM_CHIPS, Engine, ServedPair
from MaxDraft.drafts.drafter import Drafter

ENGINES: tuple[Engine, ...] = (
    *sglang_jax.ENGINES,
    *tpu_inference.ENGINES,
    *sglang.ENGINES,
    *vllm.ENGINES,
)


def engine_report(
    drafter: Drafter,
    captured_layers: Sequence[int],
    target_config: Mapping[str, Any],
    target_path: Path,
    export_path: Path,
) -> str:
    """Engine by engine: whether it can serve this pair, why, and the command that starts it."""
    layers = tuple(captured_layers)
    config = drafter.checkpoint_format.config(drafter.dims, layers, target_config, "")
    pair = ServedPair(drafter, layers, config, target_config, target_path, export_path)
    lines = [
        "Engines that can serve this head with this target "
        f"({NUM_CHIPS}: the number of devices that serve):",
        "",
    ]
    for engine in ENGINES:
        verdict = engine.verdict(pair)
        lines.append(f"{engine.name}: {verdict.answer}")
        lines += [f"  {reason}" for reason in verdict.reasons]
        if verdict.launch_line:
            lines.append(f"  {verdict.launch_line}")
        lines.append("")
    lines.append(
        f"The head reads the outputs of target layers {list(layers)} (0-based). No engine notices "
        f"wrong features: measure the accept length after starting one."
    )
    return "\n".join(lines)
