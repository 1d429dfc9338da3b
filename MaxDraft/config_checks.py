"""Values that a key cannot have, and values that cannot stand together; all are reported at once.

What one key may hold stands in config_keys.py. Nothing here touches a device: a run that cannot
work stops in the first second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from MaxDraft import config_parallelism
from MaxDraft.config_keys import KEYS
from MaxDraft.config_layers import Values, defaults, is_file, is_folder
from MaxDraft.config_renames import explain_value
from MaxDraft.config_yaml import shown

# Powers of two that the kernels' tiles divide; 512 is the largest that a TPU's VMEM has room for.
PALLAS_BLOCK_SIZES = (128, 256, 512)

# The one model that makes its own target and data.
SELF_CONTAINED_MODEL = "tiny"
# The folder in base_output_directory where that model's target and data lie.
EMBEDDED_TARGET_FOLDER = "tiny-target"
# The control characters of ASCII and Latin-1, and Unicode's separators of lines and paragraphs.
_CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"


def impossible_combinations(
    values: Values, explicit: Values | None = None, reads_files: bool = True
) -> list[str]:
    """Everything that is wrong with `values`, one line each; empty where they can be run.

    explicit: the values of the environment and the command line. One that has no effect under the
    others is an error there, since whoever typed it expects one; in a file it may stand by.
    """
    checks = (
        run_location,
        _paths,
        _choices,
        _ranges,
        _rollout,
        _draft,
        config_parallelism.problems,
        *([_data, _files] if reads_files else []),
    )
    problems = [problem for check in checks for problem in check(values)]
    return problems + list(_without_effect(values, explicit or {}))


def run_location(values: Values) -> Iterator[str]:
    """What is wrong with where the run's folder would be."""
    name, parent = values["run_name"], values["base_output_directory"]
    if name == "." or ".." in name or re.search(r"[/\\\0]", name) or len(name.encode()) > 200:
        yield (
            f"run_name must be the name of one folder, not {shown(name)}; "
            f"where that folder lies is base_output_directory"
        )
    elif re.search(_CONTROL, name):
        yield (
            f"run_name must have no line break or other control character, not {shown(name)}: "
            f"messages and commands to copy name it"
        )
    elif name == EMBEDDED_TARGET_FOLDER:
        yield (
            f"run_name={name} is the folder of the target that model_name={SELF_CONTAINED_MODEL} "
            f"makes for itself; give another run_name"
        )
    if not parent:
        yield "base_output_directory is empty; write . for the current folder"
    yield from _path_problems("base_output_directory", parent)


def _paths(values: Values) -> Iterator[str]:
    for key, row in KEYS.items():
        if row.path and key != "base_output_directory":
            yield from _path_problems(key, values[key])
    for key in ("grain_train_files", "grain_eval_files"):
        for pattern in values[key].split(";"):
            yield from _path_problems(key, pattern.strip())


def _path_problems(key: str, text: str) -> Iterator[str]:
    if "\0" in text:
        yield f"{key} holds a NUL character, which no path has"
        return
    if "://" in text:
        yield (
            f"{key} must be a local or mounted path, not {shown(text)}; mount a bucket with "
            f"gcsfuse and give that folder"
        )
        return
    try:
        Path(text).expanduser()
    except RuntimeError:  # no such user, or no home folder for this one
        user = Path(text).parts[0]
        yield f"{key}: {user} names no home folder here; write the whole path instead of {user}"


def _choices(values: Values) -> Iterator[str]:
    for key, row in KEYS.items():
        if row.choices and values[key] not in row.choices:
            hint = explain_value(key, values[key], row.choices)
            yield f"{key} must be {_either(row.choices)}, not {shown(values[key])}{hint}"


def _ranges(values: Values) -> Iterator[str]:
    for key, row in KEYS.items():
        if row.range and values[key] not in row.range:
            yield f"{key} must be {row.range}, not {values[key]}"


def _without_effect(values: Values, explicit: Values) -> Iterator[str]:
    for key, value in explicit.items():
        if not KEYS[key].needs or value == defaults()[key]:
            continue
        other, needed_values = KEYS[key].needs
        if values[other] not in needed_values:
            needed = " or ".join(f"{other}={needed}" for needed in needed_values)
            yield (
                f"{key}={value} has no effect with {other}={values[other]}; leave it out, or give "
                f"{needed}"
            )
    fraction = explicit.get("eval_fraction", 0)
    if values["grain_eval_files"] and fraction not in (0, defaults()["eval_fraction"]):
        yield (
            f"eval_fraction={fraction} has no effect beside grain_eval_files, which are the "
            f"held-out data; leave one of them out"
        )
    if explicit.get("decode_recurrent_position_offset") and values["decode_draft_steps"] == 1:
        yield (
            "decode_recurrent_position_offset=1 has no effect with decode_draft_steps=1, where the "
            "head never reads its own output; leave it out, or give more draft steps"
        )


def _rollout(values: Values) -> Iterator[str]:
    length, steps = values["max_target_length"], values["ttt_length"]
    if length <= steps + 1:
        yield (
            f"max_target_length={length} leaves no position whose rollout of ttt_length={steps} "
            f"steps fits in a row; it must be above ttt_length + 1"
        )
    layers = values["target_layer_ids"]
    if layers != sorted(set(layers)) or any(layer < 0 for layer in layers):
        yield (
            f"target_layer_ids must be different layers in ascending order, counted from 0, or "
            f"empty for the drafter's own choice; not {layers}"
        )
    block = values["attention_block_size"]
    if values["attention"] == "pallas" and block not in PALLAS_BLOCK_SIZES:
        sizes = ", ".join(map(str, PALLAS_BLOCK_SIZES))
        yield f"attention=pallas needs an attention_block_size of {sizes}; not {block}"


def _draft(values: Values) -> Iterator[str]:
    size = values["draft_head_dim"]
    if size % 2:
        yield f"draft_head_dim={size} must be even: the rotary embedding rotates pairs"
    heads, groups = values["draft_num_attention_heads"], values["draft_num_key_value_heads"]
    if heads > 0 and groups > 0 and heads % groups:
        yield (
            f"draft_num_attention_heads={heads} is no multiple of "
            f"draft_num_key_value_heads={groups}"
        )


def _data(values: Values) -> Iterator[str]:
    if values["model_name"] != SELF_CONTAINED_MODEL:
        for key, what in (
            ("target_path", "the folder with the target's config.json and *.safetensors"),
            ("grain_train_files", "JSONL files of conversations"),
        ):
            if not values[key]:
                yield f"{key} is empty: model_name={values['model_name']} needs {key}=..., {what}"
    if not values["grain_eval_files"] and values["eval_fraction"] == 0:
        yield "nothing is held out: give grain_eval_files=..., or an eval_fraction above 0"


def _files(values: Values) -> Iterator[str]:
    if values["target_path"] and not is_file(_path(values["target_path"]) / "config.json"):
        yield (
            f"target_path: there is no config.json in {values['target_path']!r}; give the folder "
            f"that the model was downloaded to"
        )
    if values["tokenizer_path"] and not is_folder(_path(values["tokenizer_path"])):
        yield f"tokenizer_path: there is no folder {values['tokenizer_path']!r}"
    if values["chat_template"] and not is_file(_path(values["chat_template"])):
        yield f"chat_template: there is no file {values['chat_template']!r}"
    # Everything else that a run writes into its folder has another suffix.
    name = values["metrics_file"]
    if Path(name).name != name or not re.fullmatch(r"[^./\\\0][^/\\\0]{0,200}\.jsonl", name):
        yield (
            f"metrics_file must be the name of a file inside the run's folder that ends in "
            f".jsonl, such as metrics.jsonl; not {shown(name)}"
        )


def _path(text: str) -> Path:
    """`text` as a path, as it is where ~ names no home folder: that is an error of its own."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _either(choices: tuple[str, ...]) -> str:
    names = [choice or "empty" for choice in choices]
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
