"""The places that a configuration is read from: files, the environment and the command line.

Each function returns what one place says, as values of their keys' types, or raises a ConfigError
that lists every mistake of that place at once.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from MaxDraft import config_yaml
from MaxDraft.config_keys import KEYS
from MaxDraft.config_renames import (
    REMOVED_KEYS,
    RENAMED_KEYS,
    explain_key,
    explain_model,
    modernized,
)
from MaxDraft.config_yaml import MAX_PROBLEMS, ConfigError, shown, stop_on

SCHEMA_PATH = Path(__file__).resolve().parent.parent / "configs" / "base.yml"
ENVIRONMENT_PREFIX = "M_"

Values = dict[str, Any]


@functools.cache
def defaults() -> Mapping[str, Any]:
    """Key -> default, of the base.yml that belongs to this code."""
    return MappingProxyType(from_file(SCHEMA_PATH))


def from_file(path: Path) -> Values:
    """The values of a YAML file; a key that is not in the table is an error."""
    values, problems = {}, []
    for key, line, node in config_yaml.read_keys(path):
        where = f"{path}:{line}"
        if len(problems) == MAX_PROBLEMS:
            problems.append(f"{where}: and so on")
            break
        if key not in KEYS:
            problems.append(f"{where}: unknown key {shown(key)}{explain_key(key, KEYS)}")
            continue
        try:
            values[key] = config_yaml.coerce(key, node, where)
        except ConfigError as error:
            problems.append(str(error))
    stop_on(problems)
    return values


def from_saved_file(path: Path) -> Values:
    """The values in the config.yml of a run, also of one that older code wrote."""
    values, problems = {}, []
    for key, line, node in config_yaml.read_keys(path):
        where = f"{path}:{line}"
        if len(problems) == MAX_PROBLEMS:
            problems.append(f"{where}: and so on")
            break
        new = RENAMED_KEYS.get(key, key)
        try:
            if new in KEYS:
                values[new] = config_yaml.coerce(new, node, where)
            elif key in REMOVED_KEYS:
                values[key] = config_yaml.construct(node, where)
            else:
                problems.append(f"{where}: unknown key {shown(key)}{explain_key(key, KEYS)}")
        except ConfigError as error:
            problems.append(str(error))
    stop_on(problems)
    return modernized(values, defaults())


def from_base_file(path: Path) -> Values:
    """The values of base.yml or of a copy of it, which must hold every key."""
    if not is_file(path):
        raise ConfigError(f"there is no configuration file {path}; pass {SCHEMA_PATH}")
    if path.samefile(SCHEMA_PATH):
        return dict(defaults())
    values = from_file(path)
    missing = [key for key in KEYS if key not in values]
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}: pass {SCHEMA_PATH} or a whole copy of it, "
            f"and what differs as key=value"
        )
    return values


def from_model_file(folder: Path, name: str) -> Values:
    """The values of <folder>/<name>.yml."""
    known = sorted(path.stem for path in folder.glob("*.yml"))
    if name not in known:
        raise ConfigError(
            f"model_name: there is no file for {shown(name)} in {folder}"
            f"{explain_model(name, known)}; model_name=default with target_path=FOLDER takes any "
            f"size of a known family. There are files for {', '.join(known) or 'no model'}"
        )
    path = folder / f"{name}.yml"
    values = from_file(path)
    stop_on(
        f"{path}: {key} belongs to one run or one machine, not to a model; give it on the "
        f"command line"
        for key in values
        if not KEYS[key].model_file
    )
    return values


def from_environment() -> Values:
    """The values of the variables M_<KEY>."""
    values, problems = {}, []
    for name in sorted(name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)):
        spelled = name.removeprefix(ENVIRONMENT_PREFIX)
        key = spelled.lower()
        if spelled == key.upper() and key in (*RENAMED_KEYS, *REMOVED_KEYS):
            problems.append(f"environment {name}: unknown key {key!r}{explain_key(key, KEYS)}")
            continue
        if key not in KEYS or spelled != key.upper():
            # Other programs have M_ variables too, so only a near miss is taken for a mistake.
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
            if near:
                right = ENVIRONMENT_PREFIX + near[0].upper()
                problems.append(f"environment {name}: did you mean {right}? Rename or unset it")
            continue
        try:
            values[key] = config_yaml.coerce_text(key, os.environ[name], f"environment {name}")
        except ConfigError as error:
            problems.append(str(error))
    stop_on(problems)
    return values


def from_command_line(arguments: Sequence[str]) -> Values:
    """The values of arguments key=value."""
    values, problems = {}, []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            problems.append(
                f"command line: {shown(argument)} is not key=value (no spaces around =)"
            )
        elif key not in KEYS:
            problems.append(f"command line: unknown key {shown(key)}{explain_key(key, KEYS)}")
        elif key in values:
            problems.append(f"command line: {key} is given twice; keep one")
        else:
            try:
                values[key] = config_yaml.coerce_text(key, text, "command line")
            except ConfigError as error:
                problems.append(str(error))
    stop_on(problems)
    return values


def contradictions(environment: Values, command_line: Values) -> Iterable[str]:
    """Keys to which the environment and the command line give different values."""
    for key in command_line:
        if key in environment and environment[key] != command_line[key]:
            yield (
                f"{key}: environment {ENVIRONMENT_PREFIX}{key.upper()} says {environment[key]!r}, "
                f"the command line {command_line[key]!r}; remove one of them"
            )


def merged(layers: Sequence[Values]) -> Values:
    """One value a key, of the layer that is strongest; `layers` begins with the weakest.

    logical_axis_rules are merged by name: a rule replaces the rule of its logical axis.
    """
    values: Values = {}
    for layer in layers:
        rules = layer.get("logical_axis_rules", [])
        replaced = {rule[0] for rule in rules}
        weaker = [r for r in values.get("logical_axis_rules", []) if r[0] not in replaced]
        values = values | layer | {"logical_axis_rules": [*weaker, *rules]}
    return values


def is_file(path: Path) -> bool:
    """Path.is_file, and False where no file can have that name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Path.is_dir, and False where no folder can have that name."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
