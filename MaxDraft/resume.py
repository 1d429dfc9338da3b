"""Whether a command may go on with a run that exists: the same configuration, the same identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from MaxDraft import pyconfig
from MaxDraft.drafts import registry
from MaxDraft.errors import UserError
from MaxDraft.pyconfig import Config


class ResumeError(UserError):
    """The run's folder holds something that this command cannot go on from."""


def check_same_config(saved: Mapping[str, Any], config: Config) -> None:
    """ResumeError naming each key that a run was saved with otherwise than it is now.

    Keys that may change on resume (config_keys.py) are not compared.
    """
    _raise_if_any(pyconfig.resume_differences(saved, config.as_dict()), config)


def check_same_identity(
    saved: Mapping[str, Any], identity: Mapping[str, Any], config: Config
) -> None:
    """ResumeError naming each difference between what a run was saved as and what it is now."""
    lines = pyconfig.differences(registry.upgraded(saved), registry.upgraded(identity), set())
    _raise_if_any(lines, config)


def _raise_if_any(differences: list[str], config: Config) -> None:
    if differences:
        raise ResumeError(
            f"{config.run_directory} holds a run that differs from this command:\n  "
            + "\n  ".join(differences)
            + "\nGive it another run_name, or the values it was started with"
        )
