"""What the tests of the configuration share."""

from pathlib import Path

import pytest

from MaxDraft import pyconfig

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "configs" / "base.yml"


def init(*arguments, base=BASE, from_run=False):
    """The Config of a command line."""
    return pyconfig.initialize(["train.py", str(base), *arguments], from_run=from_run)


def error(*arguments, **options):
    """The message of the ConfigError that a command line ends in."""
    with pytest.raises(pyconfig.ConfigError) as caught:
        init(*arguments, **options)
    return str(caught.value)
