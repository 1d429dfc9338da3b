"""Which serving engines can run an exported head with its target, and the command for each.

Wrong features raise no error in any engine, they only show as an accept length near 1. So what an
engine cannot do is said at export time.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from MaxDraft.drafts.eagle3.dims import default_captured_layers

STEPS = 3  # draft tokens of the chain in the printed commands
_SGLANG_JAX = {"llama", "phi3", "internlm3", "qwen3"}
_SGLANG_JAX_FORK = _SGLANG_JAX | {"qwen2"}


def engine_report(
    target_config: Mapping[str, Any],
    head_config: Mapping[str, Any],
    target_path: str,
    export_path: str,
) -> str:
    """Engine by engine: whether it can serve this pair, under which limits, and how to start it."""
    capture = head_config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    usual = list(default_captured_layers(target_config["num_hidden_layers"]))
    lines = ["Engines that can serve this head with this target:", ""]
    for name, (problems, limits, command) in _engines(
        target_config, head_config, capture == usual, target_path, export_path
    ).items():
        lines.append(f"{name}: {'no' if problems else 'yes'}")
        lines += [f"  {text}" for text in [*problems, *limits]]
        if not problems:
            lines.append(f"  {command}")
        lines.append("")
    lines.append(
        f"The head reads the outputs of target layers {capture} (0-based). No engine notices wrong "
        f"features: measure the accept length after starting one."
    )
    return "\n".join(lines)


def _engines(
    target: Mapping[str, Any],
    head: Mapping[str, Any],
    usual_layers: bool,
    target_path: str,
    export_path: str,
) -> dict[str, tuple[list[str], list[str], str]]:
    """Engine -> (what makes it impossible, what to know, command)."""
    family, tied = target.get("model_type"), bool(target.get("tie_word_embeddings"))
    one_kv_head = (
        ["one key/value head crashes it; train with draft_num_key_value_heads of 2 or more"]
        if head["num_key_value_heads"] == 1
        else []
    )
    chain = "fast path only for top-k 1, greedy, draft tokens = steps + 1; one draft layer"
    override = [] if usual_layers else ["the override below tells it the captured layers"]
    sglang_jax = _sglang_jax_command(head, usual_layers, target_path, export_path)
    tpu = []
    if family != "llama":
        tpu.append(f"captures features of Llama only, not of '{family}'")
    if not usual_layers:
        tpu.append("has the default captured layers built in; this head was trained on others")
    if head["head_dim"] * head["num_attention_heads"] != head["hidden_size"]:
        tpu.append("sizes its KV cache as hidden_size / heads and ignores the head's head_dim")
    return {
        "sglang-jax": (
            _captures(family, _SGLANG_JAX)
            + (["a target with tied embeddings crashes it"] if tied else [])
            + one_kv_head,
            [*override, chain],
            sglang_jax,
        ),
        "sglang-jax, the published JAX heads' fork": (
            _captures(family, _SGLANG_JAX_FORK) + one_kv_head,
            [*override, chain, "has an older base"],
            sglang_jax,
        ),
        "SGLang (GPU)": ([], [], _sglang_command(target_path, export_path)),
        "vLLM (GPU)": ([], [], _vllm_command(target_path, export_path)),
        "tpu-inference, JAX path": (
            tpu,
            ['wants "architectures": ["LlamaForCausalLM"] in the head\'s config.json'],
            _vllm_command(target_path, export_path),
        ),
    }


def _captures(family: str | None, families: set[str]) -> list[str]:
    if family in families:
        return []
    return [f"cannot capture features of '{family}' targets, only of {', '.join(sorted(families))}"]


def _sglang_jax_command(
    head: Mapping[str, Any], usual_layers: bool, target_path: str, export_path: str
) -> str:
    command = (
        f"python3 -m sgl_jax.launch_server --model-path {shlex.quote(target_path)} "
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {shlex.quote(export_path)} "
        f"--speculative-eagle-topk 1 --speculative-num-steps {STEPS} "
        f"--speculative-num-draft-tokens {STEPS + 1} --tp-size 4 --dtype bfloat16 --page-size 64 "
        f"--attention-backend fa"
    )
    if usual_layers:
        return command
    # It reads the layers from the target's config.json, not from the head's.
    layers = json.dumps({"eagle_config": head["eagle_config"]})
    return f"{command} --json-model-override-args {shlex.quote(layers)}"


def _sglang_command(target_path: str, export_path: str) -> str:
    return (
        f"python3 -m sglang.launch_server --model-path {shlex.quote(target_path)} "
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {shlex.quote(export_path)} "
        f"--speculative-eagle-topk 1 --speculative-num-steps {STEPS} "
        f"--speculative-num-draft-tokens {STEPS + 1} --dtype bfloat16"
    )


def _vllm_command(target_path: str, export_path: str) -> str:
    speculative = {"method": "eagle3", "model": export_path, "num_speculative_tokens": STEPS}
    return (
        f"vllm serve {shlex.quote(target_path)} --dtype bfloat16 "
        f"--speculative-config {shlex.quote(json.dumps(speculative))}"
    )
