"""Batches: what stands in a row, the same on any number of hosts, and exact resuming."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_encoder, many_records, write_lines

from MaxDraft.input_pipeline.batches import HostBatches, make_batch_iterator
from MaxDraft.input_pipeline.dataset import prepare_dataset
from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.packing import pack_epochs, pack_rows

T, G = 96, 4
NAMES = {"tokens", "segment_ids", "positions", "turn_ids"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(folder):
    write_lines(folder / "train.jsonl", many_records(120))
    return prepare_dataset(
        train_files=f"{folder}/*.jsonl",
        eval_files="",
        eval_fraction=0.2,
        encoder=make_encoder(),
        max_target_length=T,
        truncation_policy="truncate",
        max_skipped_fraction=0.0,
        seed=0,
        cache_dir=folder / "cache",
        vocab_size=500,
        log=lambda line: None,
    )


@pytest.fixture(scope="module")
def rows(data):
    return pack_epochs(data.train.lengths, data.train.weights, T, seed=0, num_epoch=2)


def iterator(data, rows, **changes):
    sizes = {"max_target_length": T, "global_batch_size": G, "prefetch_buffer_size": 2}
    return make_batch_iterator(data.train, rows, **{**sizes, **changes})


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert set(one) == set(other) == NAMES
        for name in NAMES:
            assert np.array_equal(one[name], other[name])


def test_a_row_holds_its_documents_one_after_the_other(data, rows):
    batches = HostBatches(data.train, rows, T, G)
    shared = [r for r in range(len(rows)) if len(rows[r]) > 1]
    assert len(shared) > 3
    for number in (0, *shared[:4]):
        batch = batches[number // G]
        assert all(x.dtype == np.int32 and x.shape == (G, T) for x in batch.values())
        row = {name: array[number % G] for name, array in batch.items()}
        turns = []
        for segment, document in enumerate(rows[number], start=1):
            here = row["segment_ids"] == segment
            tokens, turn_ids = data.train[document]
            assert np.array_equal(row["tokens"][here], tokens)
            assert np.array_equal(row["positions"][here], np.arange(len(tokens)))
            assert np.array_equal(row["turn_ids"][here] > 0, turn_ids > 0)
            numbers = row["turn_ids"][here][turn_ids > 0]
            assert np.array_equal(numbers - numbers[0], turn_ids[turn_ids > 0] - 1)
            turns += sorted(set(numbers.tolist()))
        assert turns == list(range(1, len(turns) + 1))  # no turn of two documents has one number
        pads = row["segment_ids"] == 0
        assert pads.sum() == T - data.train.lengths[rows[number]].sum()
        for name in NAMES:
            assert not row[name][pads].any()


def test_training_reads_every_row_of_full_batches_once(data, rows):
    batches = list(iterator(data, rows))
    assert len(batches) == len(rows) // G == len(iterator(data, rows))
    read = [row.tolist() for batch in batches for row in batch["tokens"]]
    direct = HostBatches(data.train, rows, T, 1)
    assert read == [direct[r]["tokens"][0].tolist() for r in range(len(read))]


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_together_see_the_batches_of_one_host(data, rows, num_hosts):
    alone = list(iterator(data, rows))
    hosts = [list(iterator(data, rows, host=h, num_hosts=num_hosts)) for h in range(num_hosts)]
    together = [
        {name: np.concatenate([host[name] for host in parts]) for name in NAMES}
        for parts in zip(*hosts, strict=True)
    ]
    assert_equal(together, alone)


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_evaluation_reads_every_row_once(data, num_hosts):
    for count in (5, 8, len(data.held_out)):
        rows = pack_rows(data.held_out.lengths[:count], T, seed=0)
        hosts = [
            list(
                make_batch_iterator(
                    data.held_out,
                    rows,
                    max_target_length=T,
                    global_batch_size=G,
                    host=h,
                    num_hosts=num_hosts,
                    pad_last=True,
                )
            )
            for h in range(num_hosts)
        ]
        assert {len(host) for host in hosts} == {-(-len(rows) // G)}
        real = sum(int((batch["segment_ids"] > 0).sum()) for host in hosts for batch in host)
        assert real == data.held_out.lengths[:count].sum()
        filled = sum(int(batch["segment_ids"].any(1).sum()) for host in hosts for batch in host)
        assert filled == len(rows)


def test_a_restored_iterator_goes_on_with_the_same_bits(data, rows):
    expected = list(iterator(data, rows))
    border = rows.epoch_ends[0] // G  # the batch with rows of both epochs
    for read in (0, 1, border, border + 1, len(expected)):
        first = iterator(data, rows)
        for _ in range(read):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        first.close()
        assert state == {"batches_read": read}
        restored = iterator(data, rows)
        if expected and read:
            next(restored)  # whatever was read before is forgotten
        restored.set_state(state)
        assert_equal(list(restored), expected[read:])
        assert_equal(list(iterator(data, rows, start=read)), expected[read:])


def test_a_run_goes_on_with_other_hosts(data, rows):
    expected = list(iterator(data, rows))
    state = {"batches_read": 3}
    parts = []
    for host in range(2):
        restored = iterator(data, rows, host=host, num_hosts=2)
        restored.set_state(state)
        parts.append(list(restored))
    together = [
        {name: np.concatenate([a[name], b[name]]) for name in NAMES}
        for a, b in zip(*parts, strict=True)
    ]
    assert_equal(together, expected[3:])


def test_an_iterator_that_ended_stays_at_its_end(data, rows):
    batches = iterator(data, rows)
    count = sum(1 for _ in batches)
    assert batches.batches_read == count == len(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_a_worker_process_makes_the_same_batches(data, rows):
    expected = list(iterator(data, rows))
    worked = iterator(data, rows, worker_count=1, start=1)
    assert_equal([next(worked) for _ in range(2)], expected[1:3])
    assert worked.get_state() == {"batches_read": 3}
    assert_equal(list(worked), expected[3:])
    worked.close()


KILLED_READER = """
import multiprocessing, os, signal, sys
from pathlib import Path
from test_batches import T, iterator, make_data
from MaxDraft.input_pipeline.packing import pack_rows
if __name__ == "__main__":
    data = make_data(Path(sys.argv[1]))
    rows = pack_rows(data.train.lengths, T, 0)
    batches = iterator(data, rows, worker_count=1)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_workers_end_with_a_reader_that_is_killed(tmp_path):
    script = tmp_path / "reader.py"
    script.write_text(KILLED_READER)
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    with (tmp_path / "output").open("w+") as output:
        # A worker that lives on would keep a pipe open, so the output goes to a file.
        subprocess.run(
            [sys.executable, script, tmp_path],
            env=environment,
            cwd=root,
            stdout=output,
            check=False,
        )
        output.seek(0)
        workers = [int(pid) for pid in output.read().split()]
    assert workers
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hosts": 3}, "4 rows cannot be shared evenly by 3 hosts"),
        ({"host": 2, "num_hosts": 2}, "there is no host 2 among 2"),
        ({"global_batch_size": 10_000}, "fewer than one global batch of 10000; raise num_epoch"),
        ({"start": 10_000}, "10000 batches were read, and this data has"),
    ],
)
def test_batches_that_cannot_be_are_an_error(data, rows, changes, message):
    with pytest.raises(DataError, match=message):
        iterator(data, rows, **changes)
