"""Where numbers go: a progress line, and metrics.jsonl and TensorBoard in the run's folder.

Each line of metrics.jsonl is one record, {"step": ..., "split": "train" or "eval", ...}. A train
record pools the steps since the record before it: sums and counts are added, and then divided.
Tokens per second leave padding out. TFLOP per second are model FLOPs (cost/flops.py) of those
tokens, so recomputation does not count as speed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from MaxDraft import storage
from MaxDraft.drafts import metrics
from MaxDraft.strict_json import JsonError, parse_json


def say(text: str) -> None:
    """Prints a line at once, so that a log file shows where a run stands."""
    print(text, flush=True)


class MetricLogger:
    """Pools the sums of training steps; prints and writes them at every flush().

    step_weights: see drafts.metrics.finish. start_step: optimizer steps done
    before; records of later ones, left by a run that was killed, are removed. flops_per_token:
    model FLOPs. write: whether this process writes files at all; the main process does.
    """

    def __init__(
        self,
        folder: Path,
        *,
        metrics_file: str,
        tensorboard: bool,
        step_weights: np.ndarray,
        start_step: int,
        total_steps: int,
        flops_per_token: float,
        num_devices: int,
        write: bool,
    ):
        self._step_weights, self._total_steps = step_weights, total_steps
        self._num_devices, self._flops_per_token = num_devices, flops_per_token
        self._pending: list[tuple[int, Mapping[str, np.ndarray]]] = []
        self._since = time.monotonic()
        self._file = self._tensorboard = None
        if write:
            path = folder / metrics_file
            _remove_records_after(path, start_step)
            self._file = path.open("a", encoding="utf-8")
            if tensorboard:
                self._tensorboard = SummaryWriter(
                    str(folder / "tensorboard"), purge_step=start_step + 1
                )

    def train_step(self, step: int, fetched: Mapping[str, np.ndarray]) -> None:
        """Adds what optimizer step `step` returned, fetched from the device."""
        self._pending.append((step, fetched))

    def flush(self) -> None:
        """Prints and writes the steps added since the last flush."""
        if not self._pending:
            return
        steps = [step for step, _ in self._pending]
        seconds = time.monotonic() - self._since
        pooled = {
            name: np.sum([fetched[name] for _, fetched in self._pending], axis=0)
            for name in metrics.SUMS
        }
        last = self._pending[-1][1]
        tokens = int(np.sum([fetched["tokens"] for _, fetched in self._pending]))
        per_second = tokens / seconds / self._num_devices
        record = metrics.finish(pooled, self._step_weights) | {
            "learning_rate": float(last["learning_rate"]),
            "gradient_norm": float(last["gradient_norm"]),
            "tokens_per_second_per_device": per_second,
            "tflops_per_second_per_device": per_second * self._flops_per_token / 1e12,
            "seconds_per_step": seconds / len(steps),
        }
        left = (self._total_steps - steps[-1]) * record["seconds_per_step"]
        say(
            f"step {steps[-1]}/{self._total_steps}  loss {record['loss']:.4f}  "
            f"{_by_step('acc', record['acc'])}  "
            f"sim_accept_length {record['sim_accept_length']:.2f}  "
            f"{per_second:,.0f} tokens/s/device  "
            f"{record['tflops_per_second_per_device']:.3f} TFLOP/s/device  "
            f"{_duration(left)} left"
        )
        self._record(steps[-1], "train", record)
        self._pending.clear()
        self._since = time.monotonic()

    def evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """Prints and writes held-out metrics; their time does not count into training's speed."""
        say(
            f"held-out after step {step}: loss {record['loss']:.4f}  "
            f"{_by_step('acc', record['acc'])}  "
            f"sim_accept_length {record['sim_accept_length']:.2f}"
        )
        self._record(step, "eval", record)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the time since the last flush out of the next tokens per second."""
        self._since = time.monotonic()

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _record(self, step: int, split: str, record: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "split": split} | dict(record)) + "\n")
        self._file.flush()
        if self._tensorboard is None:
            return
        for name, value in record.items():
            if isinstance(value, list):
                for k, part in enumerate(value):
                    self._tensorboard.add_scalar(f"{split}/{name}_{k}", part, step)
            else:
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)


def _remove_records_after(path: Path, step: int) -> None:
    """Removes the records of steps after `step`, which will be trained and recorded again.

    Lines that are no record are moved to a file beside it: the one that a kill cut short, and
    whatever else has come into the file.
    """
    if not path.exists():
        return
    records, damaged = [], []
    for line in path.read_bytes().split(b"\n"):
        recorded = _step_of_record(line)
        if recorded is not None and recorded <= step:
            records.append(line)
        elif recorded is None and line.strip():
            damaged.append(line)
    if damaged:
        aside = path.with_name(f"damaged-{path.name}")
        earlier = aside.read_bytes() if aside.exists() else b""
        storage.write_bytes(aside, earlier + b"".join(line + b"\n" for line in damaged))
        say(f"{path}: {len(damaged)} damaged line(s) were moved to {aside}")
    storage.write_bytes(path, b"".join(line + b"\n" for line in records))


def _step_of_record(line: bytes) -> int | None:
    """The optimizer step of a line of metrics.jsonl; None where it is no record."""
    try:
        record = parse_json(line, nan=True)
    except JsonError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _by_step(name: str, values: list[float]) -> str:
    return f"{name}_0..{len(values) - 1} " + " ".join(f"{value:.3f}" for value in values)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
