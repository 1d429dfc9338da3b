"""sglang-jax, and the fork of the published heads.

The fork has an older base: it serves Qwen2 and tied targets as well, and refuses to start unless
the overlap schedule is switched off.
"""

from __future__ import annotations

import json
import shlex

from MaxDraft.convert.engines.engine import NUM_CHIPS, STEPS, Engine, ServedPair

_VERSION = "sgl-project/sglang-jax cddbf6f (August 2026)"
_FORK_VERSION = "the sglang-jax fork that the published JAX heads name"
_RUN = f"{_VERSION}: an export was served by its engine on a CPU, accept length as measured here"
_REFUSED = {
    "phi3": "its class has the setter of captured layers, but fused weights are not found",
    None: "their model class has no setter of captured layers",
}


def _launch_line(pair: ServedPair) -> str:
    line = (
        f"python3 -m sgl_jax.launch_server --model-path {shlex.quote(str(pair.target_path))} "
        f"--speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {shlex.quote(str(pair.export_path))} "
        f"--speculative-eagle-topk 1 --speculative-num-steps {STEPS} "
        f"--speculative-num-draft-tokens {STEPS + 1} --tp-size {NUM_CHIPS} --dtype bfloat16 "
        f"--page-size 64 --attention-backend fa"
    )
    if pair.captures_default_layers:
        return line
    # It reads the captured layers from the target's config.json, not from the drafter's.
    layers = json.dumps({"eagle_config": pair.drafter_config["eagle_config"]})
    return f"{line} --json-model-override-args {shlex.quote(layers)}"


def _fork_launch_line(pair: ServedPair) -> str:
    return f"{_launch_line(pair)} --disable-overlap-schedule"


def _one_kv_head(pair: ServedPair) -> list[str]:
    if pair.drafter_config["num_key_value_heads"] > 1:
        return []
    return ["one key/value head crashes it; train with draft_num_key_value_heads of 2 or more"]


def _problems(pair: ServedPair) -> list[str]:
    tied = ["a target with tied embeddings crashes it"] if pair.has_tied_embeddings else []
    return tied + _one_kv_head(pair)


def _limits(pair: ServedPair) -> list[str]:
    override = "the override in the launch line tells it the captured layers"
    return [
        *([] if pair.captures_default_layers else [override]),
        "its fast path takes top-k 1 and draft tokens = steps + 1; from the second draft on, "
        "positions are one too far (decode_recurrent_position_offset=1 predicts that)",
    ]


SGLANG_JAX = Engine(
    name="sglang-jax",
    version=_VERSION,
    families={
        "llama": f"{_VERSION}, models/llama.py",
        "qwen3": f"{_VERSION}, models/qwen3.py",
    },
    refused_families=_REFUSED,
    drafters={"eagle3": {"": _RUN}},
    problems=_problems,
    limits=_limits,
    launch_line=_launch_line,
)
FORK = Engine(
    name="sglang-jax, fork of the published JAX heads",
    version=_FORK_VERSION,
    families={},  # no version of it can be named, so nothing is evidence
    refused_families={
        **_REFUSED,
        **dict.fromkeys(("llama", "qwen2", "qwen3")),
    },
    drafters={"eagle3": {"": _FORK_VERSION}},
    problems=_one_kv_head,
    limits=lambda pair: [
        "made for Llama, Qwen2 and Qwen3 targets, also with tied embeddings; no version is named",
        *_limits(pair),
    ],
    launch_line=_fork_launch_line,
)
ENGINES = (SGLANG_JAX, FORK)
