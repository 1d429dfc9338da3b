"""Fixtures of whole runs: one that nothing disturbed, and fresh jobs on the same target."""

import shutil

import pytest
from run_helpers import Job


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 24 steps that nothing disturbed, and what it printed."""
    job = Job(tmp_path_factory.mktemp("whole"))
    return job, job.run()


@pytest.fixture
def job(whole, tmp_path):
    """A fresh job on the same target and data, with the programs compiled before."""
    for name in ("target", "data.jsonl", "jax-cache"):
        source = whole[0].folder / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    return Job(tmp_path)
