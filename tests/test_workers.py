"""Worker processes of the data pipeline end with the process that trains."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import time
import grain
from absl import flags
from MaxDraft.input_pipeline.workers import end_with_trainer

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.range(1000).to_iter_dataset(grain.ReadOptions(1, 1))
    options = grain.MultiprocessingOptions(2, per_worker_buffer_size=1)
    batches = iter(dataset.mp_prefetch(options, end_with_trainer))
    next(batches)
    print("reading", flush=True)
    time.sleep(600)
"""


def descendants(process):
    """Numbers of the processes below one, on Linux."""
    children = [
        int(child)
        for thread in Path(f"/proc/{process}/task").iterdir()  # children belong to threads
        for child in (thread / "children").read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_of_a_killed_trainer_end(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    trainer = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert trainer.stdout.readline() == "reading\n"
    children = descendants(trainer.pid)
    assert len(children) >= 2
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 20
    while (left := [child for child in children if is_alive(child)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert not left
