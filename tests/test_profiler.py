"""The trace holds the steps that were asked for, and is written also where training ends early."""

import jax
import jax.numpy as jnp
import pytest
from config_helpers import init

from MaxDraft.profiler import Profiler


def run_steps(profiler, steps, fails_at=None):
    """Training steps of one addition each."""
    state = jnp.zeros(4)
    try:
        for number in steps:
            with profiler.step(number, state):
                state = state + 1
                if number == fails_at:
                    raise RuntimeError("a step failed")
    finally:
        profiler.close()
    return state


@pytest.fixture
def calls(monkeypatch):
    """What jax.profiler is asked to do."""
    calls = []
    annotation = jax.profiler.StepTraceAnnotation

    def annotated(name, step_num):
        calls.append(step_num)
        return annotation(name, step_num=step_num)

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", annotated)
    return calls


def profiler_of(tmp_path, *arguments, next_step=1, last_step=50):
    folder = f"base_output_directory={tmp_path}"
    return Profiler.from_config(init(folder, "run_name=r", *arguments), next_step, last_step)


def test_the_trace_holds_the_steps_after_the_skipped_ones(calls, tmp_path):
    keys = ["profiler=xplane", "skip_first_n_steps_for_profiler=2", "profiler_steps=3"]
    run_steps(profiler_of(tmp_path, *keys), range(1, 8))
    assert calls == [1, 2, f"start {tmp_path}/r/profile", 3, 4, 5, "stop", 6, 7]


def test_skipped_steps_are_counted_from_where_a_run_goes_on(calls, tmp_path):
    profiler = profiler_of(tmp_path, "profiler=xplane", "profiler_steps=1", next_step=41)
    run_steps(profiler, range(41, 44))
    assert calls == [41, f"start {tmp_path}/r/profile", 42, "stop", 43]


def test_a_trace_ends_with_the_training(calls, tmp_path):
    run_steps(profiler_of(tmp_path, "profiler=xplane"), range(1, 4))
    assert calls == [1, f"start {tmp_path}/r/profile", 2, 3, "stop"]


def test_a_trace_ends_where_a_step_fails(calls, tmp_path):
    with pytest.raises(RuntimeError, match="a step failed"):
        run_steps(profiler_of(tmp_path, "profiler=xplane"), range(1, 9), fails_at=3)
    assert calls[-2:] == [3, "stop"]


def test_a_trace_that_would_begin_too_late_is_told(calls, tmp_path, capsys):
    run_steps(profiler_of(tmp_path, "profiler=xplane", last_step=1), [1])
    assert "it would begin at step 2 and the training ends at step 1" in capsys.readouterr().out
    assert calls == [1]


def test_without_a_profiler_steps_are_annotated_only(calls, tmp_path):
    run_steps(profiler_of(tmp_path), range(1, 4))
    assert calls == [1, 2, 3]


def test_a_trace_is_written_for_xprof(tmp_path):
    state = run_steps(Profiler(tmp_path / "profile", 2, 2), range(1, 6))
    assert state.tolist() == [5.0] * 4
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
