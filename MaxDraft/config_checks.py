"""Values that cannot be, and values that cannot be together; all are reported at once.

Nothing here touches a device: a run that cannot work stops in the first second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from MaxDraft.config_yaml import nearest

Values = dict[str, Any]

CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "weight_dtype": ("bfloat16", "float32"),
    "target_quantization": ("dequantize", "keep_quantized"),
    "matmul_precision": ("default", "high", "highest"),
    "loss": ("kl", "lk_hybrid", "lk_alpha"),
    "optimizer": ("adamw", "muon"),
    "learning_rate_schedule": ("cosine", "wsd"),
    "attention_kernel": ("xla", "pallas"),
    "loss_alignment": ("serving", "specforge"),
    "loss_denominator": ("counted", "specforge"),
    "loss_turns": ("all", "last"),
    "truncation_policy": ("truncate", "drop"),
    "run_checkpoint": ("best", "latest"),
}

# (what must hold, the test, the keys)
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "at least 1",
        lambda x: x >= 1,
        "draft_vocab_size ttt_length attention_block_size vocab_block_size rollout_block_size "
        "max_target_length "
        "grain_prefetch_buffer_size num_epoch per_device_batch_size gradient_accumulation_steps "
        "checkpoint_period max_num_checkpoints_to_keep log_period distributed_num_processes "
        "decode_num_prompts decode_batch_size decode_max_new_tokens decode_draft_steps",
    ),
    (
        "0 or more",
        lambda x: x >= 0,
        "draft_intermediate_size draft_num_attention_heads draft_num_key_value_heads "
        "draft_head_dim init_weights_seed data_shuffle_seed grain_worker_count "
        "gradient_clipping_threshold adam_weight_decay distributed_process_id decode_temperature",
    ),
    ("more than 0", lambda x: x > 0, "learning_rate adam_eps"),
    ("at least 1, or -1", lambda x: x >= 1 or x == -1, "steps eval_interval eval_steps"),
    (
        "at least 0 and below 1",
        lambda x: 0 <= x < 1,
        "eval_fraction warmup_steps_fraction decay_steps_fraction adam_b1 adam_b2 muon_beta",
    ),
    ("between 0 and 1", lambda x: 0 <= x <= 1, "max_skipped_fraction"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "ttt_loss_decay"),
)

# The one model that makes its own target and data.
SELF_CONTAINED_MODEL = "tiny"

# The names of dimensions in the parameter tables and in `constrain`.
LOGICAL_AXES = (
    "target_experts",
    "target_expert_embed",
    "target_expert_mlp",
    *(f"target_{name}" for name in ("batch", "embed", "heads", "kv_heads", "mlp", "vocab")),
    *(f"draft_{name}" for name in ("batch", "embed", "heads", "kv_heads", "mlp", "vocab")),
)


def impossible_combinations(values: Values, reads_files: bool = True) -> list[str]:
    """Everything that is wrong with `values`, one line each; empty where they can be run."""
    checks = (
        run_location,
        _choices,
        _ranges,
        _rollout,
        _draft,
        _parallelism,
        _rules,
        _distributed,
        *([_data] if reads_files else []),
    )
    return [problem for check in checks for problem in check(values)]


def run_location(v: Values) -> Iterator[str]:
    """What is wrong with where the run's folder would be."""
    name, parent = v["run_name"], v["base_output_directory"]
    if name == "." or ".." in name or re.search(r"[/\\\0]", name):
        yield (
            f"run_name must be the name of one folder, not {name!r}; "
            f"where that folder lies is base_output_directory"
        )
    if not parent:
        yield "base_output_directory is empty; write . for the current folder"
    if "://" in parent:
        yield (
            f"base_output_directory must be a local or mounted folder, not {parent!r}; "
            f"mount a bucket with gcsfuse and give that folder"
        )


def _choices(v: Values) -> Iterator[str]:
    for key, choices in CHOICES.items():
        if v[key] not in choices:
            yield f"{key} must be {_either(choices)}, not {v[key]!r}{nearest(v[key], choices)}"


def _ranges(v: Values) -> Iterator[str]:
    for meaning, holds, keys in RANGES:
        for key in keys.split():
            if not holds(v[key]):
                yield f"{key} must be {meaning}, not {v[key]}"


def _rollout(v: Values) -> Iterator[str]:
    if v["max_target_length"] <= v["ttt_length"] + 1:
        yield (
            f"max_target_length={v['max_target_length']} leaves no position whose rollout of "
            f"ttt_length={v['ttt_length']} steps fits in a row; it must be above ttt_length + 1"
        )
    layers = v["target_layer_ids"]
    if layers and not (len(layers) == 3 and 0 <= layers[0] < layers[1] < layers[2]):
        yield (
            f"target_layer_ids must be three different layers, ascending from 0, or empty for "
            f"the default; not {layers}"
        )


def _draft(v: Values) -> Iterator[str]:
    if v["draft_head_dim"] % 2:
        yield f"draft_head_dim={v['draft_head_dim']} must be even: the rotary embedding turns pairs"
    heads, groups = v["draft_num_attention_heads"], v["draft_num_key_value_heads"]
    if heads > 0 and groups > 0 and heads % groups:
        yield (
            f"draft_num_attention_heads={heads} is no multiple of "
            f"draft_num_key_value_heads={groups}"
        )


def _parallelism(v: Values) -> Iterator[str]:
    axes = _axes(v)
    if sorted(v["mesh_axes"]) != sorted(axes):
        yield (
            f"mesh_axes must name each of {', '.join(axes)} once, the axes that have an "
            f"ici_ and a dcn_ key; not {v['mesh_axes']}"
        )
    for kind, things in (("ici", "devices"), ("dcn", "slices")):
        sizes = {f"{kind}_{axis}_parallelism": v[f"{kind}_{axis}_parallelism"] for axis in axes}
        for key, size in sizes.items():
            if size < 1 and size != -1:
                yield f"{key} must be at least 1, or -1 for the {things} that remain, not {size}"
        rest = [key for key, size in sizes.items() if size == -1]
        if len(rest) > 1:
            yield f"{' and '.join(rest)} are both -1; only one can take the {things} that remain"


def _axes(v: Values) -> list[str]:
    return [key[len("ici_") : -len("_parallelism")] for key in v if key.startswith("ici_")]


def _rules(v: Values) -> Iterator[str]:
    seen = set()
    draft_batch = dict(v["logical_axis_rules"]).get("draft_batch", ())
    if sorted(draft_batch) != sorted(_axes(v)):
        yield (
            f"logical_axis_rules: draft_batch must be split over every mesh axis, "
            f"{', '.join(_axes(v))}; not {list(draft_batch)}"
        )
    for logical, mesh_axes in v["logical_axis_rules"]:
        if logical in seen:
            yield f"logical_axis_rules: {logical} has two rules; keep one"
        seen.add(logical)
        if logical not in LOGICAL_AXES:
            yield (
                f"logical_axis_rules: no parameter or activation has the axis {logical!r}"
                f"{nearest(logical, LOGICAL_AXES)}"
            )
        for axis in dict.fromkeys(mesh_axes):
            if axis not in _axes(v):
                yield (
                    f"logical_axis_rules: {logical} names {axis!r}, which is no mesh axis"
                    f"{nearest(axis, _axes(v))}"
                )
            if mesh_axes.count(axis) > 1:
                yield f"logical_axis_rules: {logical} names mesh axis {axis!r} twice"


def _distributed(v: Values) -> Iterator[str]:
    address = v["distributed_coordinator"]
    count, index = v["distributed_num_processes"], v["distributed_process_id"]
    if address in ("", "auto"):
        if (count, index) != (1, 0):
            yield (
                f"distributed_num_processes={count} and distributed_process_id={index} need "
                f"distributed_coordinator=host:port of process 0, not {address!r}"
            )
        return
    if not re.fullmatch(r"\S+:[0-9]{1,5}", address):
        yield f"distributed_coordinator must be host:port, auto or empty, not {address!r}"
    if count < 2:
        yield (
            f"distributed_coordinator={address} is for several processes; give "
            f"distributed_num_processes, the same for all, and each its distributed_process_id"
        )
    elif index >= count:
        yield (
            f"distributed_process_id={index} must be below distributed_num_processes={count}: "
            f"the processes count from 0"
        )


def _data(v: Values) -> Iterator[str]:
    if v["model_name"] != SELF_CONTAINED_MODEL:
        for key, what in (
            ("target_path", "the folder with the target's config.json and *.safetensors"),
            ("grain_train_files", "JSONL files of conversations"),
        ):
            if not v[key]:
                yield f"{key} is empty: model_name={v['model_name']} needs {key}=..., {what}"
    if v["target_path"] and not _path(v["target_path"], "config.json").is_file():
        yield (
            f"target_path: there is no config.json in {v['target_path']!r}; give the folder that "
            f"the model was downloaded to"
        )
    if v["tokenizer_path"] and not _path(v["tokenizer_path"]).is_dir():
        yield f"tokenizer_path: there is no folder {v['tokenizer_path']!r}"
    if v["chat_template"] and not _path(v["chat_template"]).is_file():
        yield f"chat_template: there is no file {v['chat_template']!r}"
    if not v["grain_eval_files"] and v["eval_fraction"] == 0:
        yield "nothing is held out: give grain_eval_files=..., or an eval_fraction above 0"
    if not v["metrics_file"] or Path(v["metrics_file"]).name != v["metrics_file"]:
        yield f"metrics_file must be a file name inside the run's folder, not {v['metrics_file']!r}"


def _path(text: str, *inside: str) -> Path:
    return Path(text).expanduser().joinpath(*inside)


def _either(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
