"""tpu-inference, vLLM's TPU backend, with its models in JAX."""

from __future__ import annotations

from MaxDraft.convert.engines import vllm
from MaxDraft.convert.engines.engine import Engine, ServedPair

_VERSION = "vllm-project/tpu-inference b8692ff (August 2026)"
_ARCHITECTURE = "LlamaForCausalLM"  # it registers EAGLE-3 under this name only


def _problems(pair: ServedPair) -> list[str]:
    config, problems = pair.drafter_config, []
    if config["architectures"] != [_ARCHITECTURE]:
        problems.append(
            f"does not register the architecture {config['architectures'][0]}; serve a copy of the "
            f'folder whose config.json has "architectures": ["{_ARCHITECTURE}"], with vLLM\'s '
            f"launch line"
        )
    if not pair.captures_default_layers:
        problems.append("has the default captured layers built in; this drafter reads others")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        problems.append("sizes its KV cache as hidden_size / heads and ignores head_dim")
    return problems


TPU_INFERENCE = Engine(
    name="tpu-inference, JAX path",
    version=_VERSION,
    families={"llama": f"{_VERSION}, models/jax/llama3.py"},
    refused_families={None: "it captures hidden states of Llama only"},
    drafters={"eagle3": {"": f"{_VERSION}, models/common/model_loader.py"}},
    problems=_problems,
    launch_line=vllm.launch_line,
)
ENGINES = (TPU_INFERENCE,)
