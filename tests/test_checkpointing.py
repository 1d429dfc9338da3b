"""Checkpoints: what was saved comes back bit for bit, and nothing damaged is taken for it."""

import json
import os
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxDraft import checksums, pyconfig
from MaxDraft.checkpointing import Checkpoints
from MaxDraft.resume import ResumeError, check_same_config, check_same_identity
from MaxDraft.train_step import TrainState

IDENTITY = {"target": "abc", "optimizer steps": 30}
VOCABULARY = np.array([1, 5, 7], np.int32)


@pytest.fixture
def config(tmp_path):
    return pyconfig.initialize(
        ["train.py", "configs/base.yml", f"base_output_directory={tmp_path}", "run_name=r"]
    )


def state(step):
    params = {"fc": jnp.arange(4096, dtype=jnp.float32) + step}
    return TrainState(
        step=jnp.int32(step), params=params, optimizer={"mu": jax.tree.map(jnp.ones_like, params)}
    )


def checkpoints(config, log=None, **options):
    opened = Checkpoints(config, (log if log is not None else []).append, **options)
    opened.set_identity(IDENTITY)
    return opened


def save(config, steps=(10, 20), metrics=None):
    opened = checkpoints(config)
    for step in steps:
        opened.save(step, state(step), VOCABULARY, step, metrics)
    opened.close()


def restore(config, log=None):
    """Step, first parameter, vocabulary, batches read of the newest readable checkpoint."""
    opened = checkpoints(config, log)
    shape = jax.eval_shape(lambda: state(0))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shape)
    restored, vocabulary, batches_read = opened.restore_latest(abstract)
    opened.close()
    return int(restored.step), float(restored.params["fc"][0]), vocabulary.tolist(), batches_read


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def data_files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d")


def test_the_newest_checkpoint_comes_back(config):
    save(config)
    assert restore(config) == (20, 20.0, VOCABULARY.tolist(), 20)


@pytest.mark.parametrize("item", ["params", "optimizer", "vocabulary", "meta", "metrics"])
def test_one_flipped_bit_takes_the_checkpoint_before(config, item):
    save(config, metrics={"loss": 1.5})
    folder = config.run_directory / "checkpoints" / "20" / item
    files = data_files(folder) or [folder / ("metadata" if item == "meta" else "metrics")]
    for number in range(len(files)):
        log = []
        flip_a_bit(files[number])
        assert restore(config, log) == (10, 10.0, VOCABULARY.tolist(), 10)
        assert any("checkpoint 20 is damaged" in line for line in log)
        aside = config.run_directory / "damaged-checkpoint-20"
        assert aside.is_dir()
        flip_a_bit(aside / files[number].relative_to(folder.parent))  # whole again
        aside.rename(folder.parent)


def test_a_flipped_bit_is_seen_by_evaluation_too(config):
    save(config)
    flip_a_bit(data_files(config.run_directory / "checkpoints" / "20" / "params")[0])
    log = []
    opened = checkpoints(config, log, read_only=True)
    step, params, _ = opened.restore_params("latest", jax.eval_shape(lambda: state(0)).params)
    assert (step, float(params["fc"][0])) == (10, 10.0)
    assert "checkpoint 20 is damaged" in log[0]
    assert (config.run_directory / "checkpoints" / "20").is_dir()


def test_all_checkpoints_damaged_is_an_error(config):
    save(config)
    for step in ("10", "20"):
        flip_a_bit(data_files(config.run_directory / "checkpoints" / step / "params")[0])
    with pytest.raises(ResumeError, match=r"none of the checkpoints \[10, 20\]"):
        restore(config)


@pytest.mark.parametrize("content", [b"{}", b"5", b'{"loss": null}', b'{"loss": "1"}', b"\xff{"])
def test_broken_metrics_set_a_checkpoint_aside(config, content):
    save(config, metrics={"loss": 1.5})
    (config.run_directory / "checkpoints" / "20" / "metrics" / "metrics").write_bytes(content)
    log = []
    assert restore(config, log)[0] == 10
    assert "checkpoint 20 is damaged (metrics" in log[0]


def test_a_loss_that_is_no_number_is_never_the_best(config):
    save(config, steps=(10,), metrics={"loss": 2.0})
    save(config, steps=(20,), metrics={"loss": float("nan")})
    opened = checkpoints(config, read_only=True)
    assert opened.restore_params("best", jax.eval_shape(lambda: state(0)).params)[0] == 10
    assert restore(config)[0] == 20


@pytest.mark.parametrize("damage", ["not JSON", "[]", '{"params/d/gone": "0"}'])
def test_broken_checksums_take_the_checkpoint_before(config, damage):
    save(config)
    (config.run_directory / "checkpoints" / "20" / checksums.NAME).write_text(damage)
    assert restore(config)[0] == 10


def test_a_checkpoint_without_checksums_is_read_and_named(config):
    save(config)
    (config.run_directory / "checkpoints" / "20" / checksums.NAME).unlink()
    log = []
    assert restore(config, log)[0] == 20
    assert log == ["checkpoint 20 has no checksums: what it holds was not verified"]


def test_checksums_stand_before_the_checkpoint_has_its_name(config, monkeypatch):
    seen = []

    def write(folder):
        seen.append(folder.name)
        raise OSError("No space left on device")

    monkeypatch.setattr(checksums, "write_checksums", write)
    opened = checkpoints(config)
    opened.save(10, state(10), VOCABULARY, 10, None)
    with pytest.raises(ResumeError, match="could not be written"):
        opened.wait()
    assert seen == ["10.orbax-checkpoint-tmp"]
    assert not (config.run_directory / "checkpoints" / "10").exists()


def test_saving_returns_before_the_files_are_hashed(config, monkeypatch):
    hashed = []
    write = checksums.write_checksums

    def slow(folder):
        time.sleep(1)
        hashed.append(folder.name)
        write(folder)

    monkeypatch.setattr(checksums, "write_checksums", slow)
    opened = checkpoints(config)
    opened.save(10, state(10), VOCABULARY, 10, None)
    assert not hashed
    opened.close()
    assert hashed and restore(config)[0] == 10


def test_a_failed_save_prints_no_closed_event_loop(config, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: printed.append(raised.exc_value))
    opened = checkpoints(config)
    for error in (RuntimeError("Event loop is closed"), RuntimeError("something else")):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    opened.close()
    assert [str(error) for error in printed] == ["something else"]


def test_a_run_without_a_drafter_was_eagle3s(config):
    save(config)
    opened = checkpoints(config)
    assert opened.saved_identity() == IDENTITY | {"drafter": "eagle3"}
    check_same_identity(IDENTITY, IDENTITY | {"drafter": "eagle3"}, config)
    with pytest.raises(ResumeError, match="drafter: run has 'eagle3', now 'dflash'"):
        check_same_identity(IDENTITY, IDENTITY | {"drafter": "dflash"}, config)


def test_another_configuration_is_an_error_that_names_it(config):
    saved = config.as_dict() | {"learning_rate": 1.0, "log_period": 3}
    with pytest.raises(ResumeError, match=r"learning_rate: run has 1\.0, now") as error:
        check_same_config(saved, config)
    assert "log_period" not in str(error.value)  # may change


def test_checksums_cover_every_file_of_every_item(config):
    save(config, steps=(10,), metrics={"loss": 1.0})
    folder = config.run_directory / "checkpoints" / "10"
    written = json.loads((folder / checksums.NAME).read_text())
    files = {
        os.path.relpath(path, folder)
        for item in folder.iterdir()
        if item.is_dir()
        for path in item.rglob("*")
        if path.is_file()
    }
    assert set(written) == files
    assert {file.split("/")[0] for file in written} == {
        *("params", "optimizer", "vocabulary", "meta", "metrics")
    }
