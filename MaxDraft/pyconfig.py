"""One frozen Config from base.yml, a model file, the environment and the command line.

    base.yml < models/<model_name>.yml < (the run's config.yml) < M_<KEY> < key=value

base.yml holds every key there is with its default and a comment, config_keys.py what each key may
hold, config_layers.py reads each of the places above, and config_checks.py says which values cannot
stand together. Every mistake stops the run before any device is touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from MaxDraft import config_checks, config_help, config_layers, config_yaml, storage
from MaxDraft.config_keys import KEYS, may_change_on_resume
from MaxDraft.config_layers import Values, is_file
from MaxDraft.config_renames import modernized
from MaxDraft.config_yaml import ConfigError, nearest, stop_on

__all__ = [
    "SAVED_NAME",
    "Config",
    "ConfigError",
    "differences",
    "initialize",
    "read_saved",
    "resume_differences",
]

SAVED_NAME = "config.yml"


class Config:
    """The resolved configuration; every key of base.yml is a read-only attribute.

    Lists are tuples and dicts read-only mappings, at any depth.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]):
        object.__setattr__(self, "_values", _freeze(values))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            hint = "" if name.startswith("_") else nearest(name, self._values)
            raise AttributeError(f"no configuration key {name!r}{hint}")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the configuration is frozen: {name} cannot be set or deleted")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *self._values])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.as_dict() == other.as_dict()

    def __repr__(self) -> str:
        items = "".join(f"  {key}={value!r},\n" for key, value in self.as_dict().items())
        return f"Config(\n{items})"

    @property
    def run_directory(self) -> Path:
        """Absolute folder of this run: <base_output_directory>/<run_name>."""
        return storage.as_path(self.base_output_directory) / self.run_name

    @property
    def target_directory(self) -> Path | None:
        """Absolute target_path; None where it is empty."""
        return storage.as_path(self.target_path) if self.target_path else None

    @property
    def tokenizer_directory(self) -> Path | None:
        """Absolute tokenizer_path, or target_path where that is empty; None where both are."""
        return (
            storage.as_path(self.tokenizer_path) if self.tokenizer_path else self.target_directory
        )

    @property
    def export_directory(self) -> Path:
        """Absolute export_path, or <run>/export where that is empty."""
        return (
            storage.as_path(self.export_path) if self.export_path else self.run_directory / "export"
        )

    def as_dict(self) -> Values:
        """A mutable deep copy in plain Python types, in base.yml's order."""
        return _thaw(self._values)

    def to_yaml(self) -> str:
        """YAML text that `read_saved` reads back to exactly these values."""
        return f"# The resolved configuration of run {self.run_name!r}.\n" + yaml.dump(
            self.as_dict(),
            Dumper=_Dumper,
            sort_keys=False,
            default_flow_style=None,
            allow_unicode=True,
            width=100,
        )

    def write(self, path: str | os.PathLike) -> None:
        """Writes `to_yaml()` to a file, which holds all of it or is not there."""
        storage.write_text(path, self.to_yaml())


def initialize(argv: Sequence[str], from_run: bool = False, reads_files: bool = True) -> Config:
    """argv = [program, path/to/base.yml, key=value, ...] -> Config; ConfigError says what to fix.

    from_run: evaluate and export go on from a finished run, so that run's config.yml, found by
    base_output_directory and run_name, stands between the model file and the environment.
    reads_files: False where neither target nor data is read, so that neither need be named.
    Where argv asks for --help, prints it and raises SystemExit with status 0.
    """
    config_help.answer_and_exit(argv)
    if len(argv) < 2 or "=" in argv[1]:
        program = argv[0] if argv else "MaxDraft/train.py"
        raise ConfigError(
            f"the first argument is the configuration file: "
            f"python3 {program} configs/base.yml key=value ... (--help says more)"
        )
    base_path = Path(argv[1])
    base = config_layers.from_base_file(base_path)
    environment = config_layers.from_environment()
    command_line = config_layers.from_command_line(argv[2:])
    stop_on(config_layers.contradictions(environment, command_line))
    explicit = environment | command_line
    located = base | explicit
    model_name, output = located["model_name"], located["base_output_directory"]
    run_name = located["run_name"] or model_name
    saved: Values = {}
    if from_run:
        stop_on(config_checks.run_location(located | {"run_name": run_name}))
        saved = read_saved(storage.as_path(output) / run_name)
        saved = {key: value for key, value in saved.items() if key in KEYS}  # removed ones go
        model_name = saved.get("model_name", model_name)
        if explicit.get("model_name", model_name) != model_name:
            raise ConfigError(
                f"run {run_name!r} was made with model_name={model_name}, not "
                f"{explicit['model_name']}; leave model_name out, or give another run_name"
            )
    model = config_layers.from_model_file(base_path.parent / "models", model_name)

    values = config_layers.merged([base, model, saved, explicit])
    # The folder that was asked for decides, also where a run was moved after it was written.
    values |= {"model_name": model_name, "run_name": run_name, "base_output_directory": output}
    layers = {
        "command line": command_line,
        "environment": environment,
        f"run {run_name!r}": saved,
        f"models/{model_name}.yml": model,
        str(base_path): base,
    }
    stop_on(
        problem + _origins(problem, layers)
        for problem in config_checks.impossible_combinations(values, explicit, reads_files)
    )
    return Config(values)


def read_saved(run_directory: str | os.PathLike) -> Values:
    """The values in the config.yml of a run; ConfigError where there is none."""
    run_directory = Path(run_directory)
    path = run_directory / SAVED_NAME
    if not is_file(path):
        runs = sorted(path.parent.name for path in run_directory.parent.glob(f"*/{SAVED_NAME}"))
        raise ConfigError(
            f"no run at {run_directory}: it has no {SAVED_NAME}. Type run_name=NAME and "
            f"base_output_directory=FOLDER as train.py was given them; runs in "
            f"{run_directory.parent}: {', '.join(runs) or 'none'}"
        )
    return config_layers.from_saved_file(path)


def resume_differences(run: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each key that keeps a run, saved as `run`, from going on as `now`."""
    run = modernized(run, config_layers.defaults())
    return differences(run, now, {key for key in {**run, **now} if may_change_on_resume(key)})


def differences(run: Mapping[str, Any], now: Mapping[str, Any], ignore: set[str]) -> list[str]:
    """One line for each key, outside `ignore`, whose value differs between a run and now."""
    lines = []
    for key in [*run, *(key for key in now if key not in run)]:
        old, new = (_thaw(side[key]) if key in side else None for side in (run, now))
        if key not in ignore and old != new:
            old, new = (
                repr(value) if key in side else "no such key"
                for value, side in ((old, run), (new, now))
            )
            lines.append(f"{key}: run has {old}, now {new}")
    return lines


def _origins(problem: str, layers: Mapping[str, Values]) -> str:
    """Where each key that a problem names was given; `layers` begins with the strongest."""
    # A key without an underscore, such as steps, is also a word: it counts only where it leads.
    names = dict.fromkeys(re.findall(r"^\w+|\w+_\w+", problem))
    places = (
        next((f"{name}: {layer}" for layer, values in layers.items() if name in values), None)
        for name in names
    )
    return f" ({'; '.join(place for place in places if place)})"


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({key: _freeze(child) for key, child in value.items()})
    return tuple(_freeze(child) for child in value) if isinstance(value, list | tuple) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(child) for key, child in value.items()}
    return [_thaw(child) for child in value] if isinstance(value, list | tuple) else value


class _Dumper(yaml.SafeDumper):
    """Quotes what `config_yaml.plain` would not read back as the same text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a value that stands in two places is written twice: aliases are not read


def _represent_str(dumper: _Dumper, text: str) -> yaml.Node:
    style = None if config_yaml.plain(text) == text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)
