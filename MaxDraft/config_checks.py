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

# The one model that makes its own target and data.
SELF_CONTAINED_MODEL = "tiny"


def impossible_combinations(
    values: Values, given: Values | None = None, reads_files: bool = True
) -> list[str]:
    """Everything that is wrong with `values`, one line each; empty where they can be run.

    given: the values of the environment and the command line. One that has no effect under the
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
    return problems + list(_without_effect(values, given or {}))


def run_location(v: Values) -> Iterator[str]:
    """What is wrong with where the run's folder would be."""
    name, parent = v["run_name"], v["base_output_directory"]
    if name == "." or ".." in name or re.search(r"[/\\\0]", name) or len(name.encode()) > 200:
        yield (
            f"run_name must be the name of one folder, not {shown(name)}; "
            f"where that folder lies is base_output_directory"
        )
    if not parent:
        yield "base_output_directory is empty; write . for the current folder"
    if "://" in parent:
        yield (
            f"base_output_directory must be a local or mounted folder, not {parent!r}; "
            f"mount a bucket with gcsfuse and give that folder"
        )
    yield from _path_problems("base_output_directory", parent)


def _paths(v: Values) -> Iterator[str]:
    for key, row in KEYS.items():
        if row.path and key != "base_output_directory":
            yield from _path_problems(key, v[key])
    for key in ("grain_train_files", "grain_eval_files"):
        for pattern in v[key].split(";"):
            yield from _path_problems(key, pattern.strip())


def _path_problems(key: str, text: str) -> Iterator[str]:
    if "\0" in text:
        yield f"{key} holds a NUL character, which no path has"
        return
    try:
        Path(text).expanduser()
    except RuntimeError:  # no such user, or no home folder for this one
        user = Path(text).parts[0]
        yield f"{key}: {user} names no home folder here; write the whole path instead of {user}"


def _choices(v: Values) -> Iterator[str]:
    for key, row in KEYS.items():
        if row.choices and v[key] not in row.choices:
            hint = explain_value(key, v[key], row.choices)
            yield f"{key} must be {_either(row.choices)}, not {shown(v[key])}{hint}"


def _ranges(v: Values) -> Iterator[str]:
    for key, row in KEYS.items():
        if row.range and v[key] not in row.range:
            yield f"{key} must be {row.range}, not {v[key]}"


def _without_effect(v: Values, given: Values) -> Iterator[str]:
    for key, value in given.items():
        if not KEYS[key].needs or value == defaults()[key]:
            continue
        other, values = KEYS[key].needs
        if v[other] not in values:
            needed = " or ".join(f"{other}={value}" for value in values)
            yield (
                f"{key}={value} has no effect with {other}={v[other]}; leave it out, or give "
                f"{needed}"
            )
    fraction = given.get("eval_fraction", 0)
    if v["grain_eval_files"] and fraction not in (0, defaults()["eval_fraction"]):
        yield (
            f"eval_fraction={fraction} has no effect beside grain_eval_files, which are the "
            f"held-out data; leave one of them out"
        )


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


def _data(v: Values) -> Iterator[str]:
    if v["model_name"] != SELF_CONTAINED_MODEL:
        for key, what in (
            ("target_path", "the folder with the target's config.json and *.safetensors"),
            ("grain_train_files", "JSONL files of conversations"),
        ):
            if not v[key]:
                yield f"{key} is empty: model_name={v['model_name']} needs {key}=..., {what}"
    if not v["grain_eval_files"] and v["eval_fraction"] == 0:
        yield "nothing is held out: give grain_eval_files=..., or an eval_fraction above 0"


def _files(v: Values) -> Iterator[str]:
    if v["target_path"] and not is_file(_path(v["target_path"]) / "config.json"):
        yield (
            f"target_path: there is no config.json in {v['target_path']!r}; give the folder that "
            f"the model was downloaded to"
        )
    if v["tokenizer_path"] and not is_folder(_path(v["tokenizer_path"])):
        yield f"tokenizer_path: there is no folder {v['tokenizer_path']!r}"
    if v["chat_template"] and not is_file(_path(v["chat_template"])):
        yield f"chat_template: there is no file {v['chat_template']!r}"
    # Everything else that a run writes into its folder has another suffix.
    name = v["metrics_file"]
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
