"""SGLang on GPUs."""

from __future__ import annotations

import shlex

from MaxDraft.convert.engines.engine import NUM_CHIPS, STEPS, Engine, ServedPair

_VERSION = "SGLang (August 2026)"


def _launch_line(pair: ServedPair) -> str:
    return (
        f"python3 -m sglang.launch_server --model-path {shlex.quote(str(pair.target_path))} "
        f"--speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {shlex.quote(str(pair.export_path))} "
        f"--speculative-eagle-topk 1 --speculative-num-steps {STEPS} "
        f"--speculative-num-draft-tokens {STEPS + 1} --tp-size {NUM_CHIPS} --dtype bfloat16"
    )


_DRAFTER = f"{_VERSION}, models/llama_eagle3.py"
# Target model_type -> the file whose class has set_eagle3_layers_to_capture. Other families'
# classes may have it as well; their files have not been read.
_FAMILIES = {
    "llama": "sgl-project/sglang 0023954, models/llama.py",
    "qwen3": "sgl-project/sglang 01b5f57, models/qwen3.py",
}
SGLANG = Engine(
    name="SGLang (GPU)",
    version=_VERSION,
    families=_FAMILIES,
    refused_families={},
    drafters={"eagle3": dict.fromkeys(("", "fc_norm", "norm_output"), _DRAFTER)},
    launch_line=_launch_line,
    reads_unknown_flags=True,
)
ENGINES = (SGLANG,)
