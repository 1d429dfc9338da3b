"""Every test runs on eight forced CPU devices, with exact float32 matrix products.

The programs are tiny and run once or twice, so XLA is told not to optimize them: compiling takes
less than half the time. All this must be said before jax is imported; what the user has set stays.
"""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

WANTED = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)

flags = os.environ.get("XLA_FLAGS", "")
missing = [flag for flag in WANTED if flag.split("=")[0] not in flags]
os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    """Variables M_<KEY> of whoever runs the tests would change the configurations in them."""
    for name in [name for name in os.environ if name.startswith("M_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def empty_target(tmp_path):
    """A target folder, as far as the configuration looks into it."""
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def config_copy(tmp_path):
    """configs/ copied, to be edited by a test; returns (base.yml, models folder)."""
    models = tmp_path / "configs" / "models"
    models.mkdir(parents=True)
    base = models.parent / "base.yml"
    base.write_text((ROOT / "configs" / "base.yml").read_text())
    (models / "tiny.yml").write_text("draft_vocab_size: 64\n")
    (models / "other.yml").write_text("learning_rate: 2e-4\nttt_length: 5\n")
    return base, models


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Compiled programs of a module go when it ends.

    Each holds pieces of the process's address space, of which Linux allows 65,530 (its
    vm.max_map_count); a worker that keeps the programs of all modules dies of it.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 24 steps that nothing disturbed, and what it printed."""
    from run_helpers import Job

    job = Job(tmp_path_factory.mktemp("whole"))
    return job, job.run()


@pytest.fixture
def job(whole, tmp_path):
    """A fresh job on the same target and data, with the programs compiled before."""
    from run_helpers import Job

    for name in ("target", "data.jsonl", "jax-cache"):
        source = whole[0].folder / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    return Job(tmp_path)


@pytest.fixture
def interpreted_kernels(monkeypatch):
    """The attention kernels run as jax operations on any device, as Pallas interprets them."""
    import functools
    import types

    from MaxDraft.layers import attention

    for name in ("tpu", "gpu"):
        kernel = attention.IMPLEMENTATIONS[name]
        passes = {
            part: functools.partial(getattr(kernel, part), interpret=True)
            for part in ("forward", "backward")
        }
        monkeypatch.setitem(attention.IMPLEMENTATIONS, name, types.SimpleNamespace(**passes))
