"""The training loop: nothing moves between host and devices unasked; a bad step is explained."""

import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxDraft import pyconfig
from MaxDraft.run import training_loop
from MaxDraft.run.stop_signal import StopSignal
from MaxDraft.run.training_loop import PendingStep
from MaxDraft.run.training_run import TrainingError
from MaxDraft.train_step import TrainState

BASE = Path(__file__).parent.parent / "configs" / "base.yml"


class Log:
    """A metric logger that remembers what it was told."""

    def __init__(self):
        self.steps, self.flushes = [], 0

    def train_step(self, step, numbers):
        self.steps.append((step, float(numbers["total_loss"])))

    def flush(self):
        self.flushes += 1

    def evaluation(self, step, metrics):
        self.evaluated = step

    def restart_clock(self):
        pass

    def close(self):
        pass


def numbers(loss=1.0):
    finite = bool(np.isfinite(loss))
    return {
        "total_loss": jnp.float32(loss),
        "gradient_norm": jnp.float32(2.0),
        "finite": jnp.asarray(finite),
    }


def loop_over(step_function, monkeypatch, steps=3):
    """Runs the loop with a step of one's own -> (the log, its result)."""
    log = Log()
    monkeypatch.setattr(training_loop, "_metric_logger", lambda run, start_step: log)
    monkeypatch.setattr(training_loop, "held_out_metrics", lambda *args: {})
    checkpoints = types.SimpleNamespace(save=lambda *args: None, wait=lambda: None)
    run = types.SimpleNamespace(
        config=pyconfig.initialize(["train.py", str(BASE)]),
        total_steps=steps,
        train_batches=lambda start: iter([jnp.ones(3)] * steps),
        programs=types.SimpleNamespace(train=step_function),
        checkpoints=checkpoints,
    )
    state = TrainState(jnp.int32(0), jnp.zeros(3), ())
    return log, training_loop.train(run, None, state, np.arange(3), 0)


def test_steps_run_in_order_and_each_is_logged_once(monkeypatch):
    @jax.jit
    def step(state, frozen, batch):
        loss = state.params.sum()
        return TrainState(state.step + 1, state.params + batch, ()), numbers() | {
            "total_loss": loss
        }

    log, (state, stopped) = loop_over(step, monkeypatch)
    assert log.steps == [(1, 0.0), (2, 3.0), (3, 6.0)]
    assert (int(state.step), stopped, log.evaluated) == (3, False, 3)


def test_an_implicit_transfer_inside_a_step_is_an_error(monkeypatch):
    def step(state, frozen, batch):
        moved = jnp.sin(np.ones(3))  # goes to the device without being asked to
        return TrainState(state.step + 1, moved, ()), numbers()

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop_over(step, monkeypatch)


def test_a_step_that_is_not_finite_names_itself_and_what_to_do():
    log = Log()
    pending = PendingStep(log, log_period=2, abort_on_nan_loss=True)
    pending.put(7, numbers(np.nan))
    with pytest.raises(TrainingError, match=r"step 7: loss nan.*lower learning_rate"):
        pending.settle()
    assert log.steps == []


def test_a_step_that_is_not_finite_is_left_out_by_key(capsys):
    log = Log()
    pending = PendingStep(log, log_period=2, abort_on_nan_loss=False)
    for step, loss in ((1, 5.0), (2, np.inf), (3, 4.0)):
        pending.put(step, numbers(loss))
        pending.settle()
    assert log.steps == [(1, 5.0), (3, 4.0)]
    assert log.flushes == 1
    assert "step 2: loss or gradient is not finite; the step is left out" in capsys.readouterr().out


@pytest.mark.parametrize(("everything_saved", "status"), [(True, 42), (False, 130)])
def test_a_signal_after_training_tells_whether_all_is_saved(everything_saved, status):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        StopSignal().exit_at_once_from_now_on(everything_saved)
        with pytest.raises(SystemExit) as stopped:
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stopped.value.code == status
