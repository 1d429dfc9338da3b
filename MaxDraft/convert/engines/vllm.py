"""vLLM on GPUs."""

from __future__ import annotations

import json
import shlex

from MaxDraft.convert.engines.engine import NUM_CHIPS, STEPS, Engine, ServedPair

_VERSION = "vLLM (August 2026)"
_TARGETS = f"{_VERSION}, config/speculative.py, eagle3_target_supported"


def launch_line(pair: ServedPair) -> str:
    """The command that serves a pair; tpu-inference is started by it too."""
    speculative = {
        "method": "eagle3",
        "model": str(pair.export_path),
        "num_speculative_tokens": STEPS,
    }
    return (
        f"vllm serve {shlex.quote(str(pair.target_path))} --tensor-parallel-size {NUM_CHIPS} "
        f"--dtype bfloat16 --speculative-config {shlex.quote(json.dumps(speculative))}"
    )


_DRAFTER = "vLLM 0.22 and later (vllm-project/vllm#42764), models/llama_eagle3.py"
_LISTED = ("llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss")
_NOT_LISTED = (
    *("gemma2", "gemma3_text", "glm4", "glm4_moe", "glm4_moe_lite"),
    *("mistral", "mixtral", "phi3", "seed_oss"),
)
VLLM = Engine(
    name="vLLM (GPU)",
    version=_VERSION,
    families=dict.fromkeys(_LISTED, f"{_TARGETS} has it"),
    refused_families=dict.fromkeys(_NOT_LISTED, f"not in {_TARGETS}; later versions may differ"),
    drafters={"eagle3": dict.fromkeys(("", "fc_norm", "norm_output"), _DRAFTER)},
    launch_line=launch_line,
    reads_unknown_flags=True,
)
ENGINES = (VLLM,)
