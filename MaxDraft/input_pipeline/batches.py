"""Packed rows -> this host's batches, prepared ahead by Grain's threads or worker processes.

    global batch b = rows[b * global_batch_size : (b + 1) * global_batch_size]
    host h         = the h-th contiguous part of every global batch, of num_hosts equal ones

Global batches are the same on one host and on many.

Training drops the rows at the very end of the run that do not fill a global batch; evaluation fills
them up with empty rows, so that every row counts exactly once. The position in the data is one
number, the global batches read, and so it means the same on another number of hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from MaxDraft.input_pipeline.dataset import Documents
from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.packing import Rows
from MaxDraft.input_pipeline.workers import end_with_trainer

Batch = dict[str, np.ndarray]
READ_THREADS = 4  # copying memory-mapped tokens: more would only wait for each other


@dataclasses.dataclass(frozen=True, eq=False)
class HostBatches:
    """Random access to one host's part of every global batch.

    batches[b] -> int32 [global_batch_size / num_hosts, T] each:
        tokens        0 at pads
        segment_ids   1, 2, ... for the documents of the row, 0 at pads
        positions     0, 1, ... within the document, 0 at pads
        turn_ids      0, or the assistant turn, numbered through all documents of the row
    DataError: a global batch that the hosts cannot share evenly, no such host, too few rows.
    """

    documents: Documents
    rows: Rows
    max_target_length: int
    global_batch_size: int  # rows
    host: int = 0
    num_hosts: int = 1
    pad_last: bool = False  # evaluation: the last global batch may hold empty rows

    def __post_init__(self) -> None:
        batch_size, num_hosts = self.global_batch_size, self.num_hosts
        if batch_size < 1 or num_hosts < 1 or batch_size % num_hosts:
            raise DataError(
                f"a global batch of {batch_size} rows cannot be shared evenly by {num_hosts} hosts"
            )
        if not 0 <= self.host < num_hosts:
            raise DataError(
                f"there is no host {self.host} among {num_hosts} (0 to {num_hosts - 1})"
            )
        if not len(self):
            raise DataError(
                f"the data packs into {len(self.rows)} rows of {self.max_target_length} tokens, "
                f"fewer than one global batch of {batch_size}; raise num_epoch, give more data, or "
                f"lower per_device_batch_size or gradient_accumulation_steps"
            )

    def __len__(self) -> int:
        """Global batches of the whole run."""
        batch_size = self.global_batch_size
        full = len(self.rows) // batch_size
        return -(-len(self.rows) // batch_size) if self.pad_last else full

    def __getitem__(self, batch: int) -> Batch:
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        share = self.global_batch_size // self.num_hosts
        first = batch * self.global_batch_size + self.host * share
        names = ("tokens", "segment_ids", "positions", "turn_ids")
        arrays = {name: np.zeros((share, self.max_target_length), np.int32) for name in names}
        for i in range(share):
            if first + i < len(self.rows):
                self._fill({name: array[i] for name, array in arrays.items()}, first + i)
        return arrays

    def _fill(self, row: Batch, number: int) -> None:
        start, turns = 0, 0
        for segment, document in enumerate(self.rows[number], start=1):
            tokens, turn_ids = self.documents[document]
            end = start + len(tokens)
            row["tokens"][start:end] = tokens
            row["segment_ids"][start:end] = segment
            row["positions"][start:end] = np.arange(len(tokens))
            row["turn_ids"][start:end] = np.where(turn_ids > 0, turn_ids + turns, 0)
            start, turns = end, turns + int(turn_ids.max())


class BatchIterator(Iterator[Batch]):
    """Batches in order from number `start`; get_state() and set_state() keep the position.

    The state is {"batches_read": n}, plain JSON: the global batches read since the run began. It is
    independent of hosts, workers and prefetching. Batches made ahead are not counted as read.
    """

    def __init__(
        self, batches: HostBatches, start: int, worker_count: int, prefetch_buffer_size: int
    ) -> None:
        self._batches = batches
        self._worker_count = worker_count
        self._prefetch = prefetch_buffer_size
        self._iterator: grain.DatasetIterator | None = None
        self.set_state({"batches_read": start})

    def __len__(self) -> int:
        """Batches from the beginning of the run to its end, read or not."""
        return len(self._batches)

    @property
    def batches_read(self) -> int:
        return self._read

    def __next__(self) -> Batch:
        if self._iterator is None:
            if self._read >= len(self._batches):
                raise StopIteration
            self._iterator = self._open()
        batch = next(self._iterator)
        self._read += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"batches_read": self._read}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on behind the batches that were read; DataError: beyond the end of the run."""
        read = state["batches_read"]
        if not 0 <= read <= len(self._batches):
            raise DataError(
                f"{read} batches were read, and this data has {len(self._batches)} in all: it is "
                f"not the data the run began with"
            )
        self.close()
        self._read = read

    def close(self) -> None:
        """Stops the threads and workers; reading on starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self) -> grain.DatasetIterator:
        remaining = grain.MapDataset.source(self._batches)[self._read :]
        threads = min(READ_THREADS, self._prefetch)
        if not self._worker_count:
            reading = grain.ReadOptions(threads, self._prefetch)
            return iter(remaining.to_iter_dataset(reading))
        # Starting workers, Grain looks at absl's flags, which absl refuses before a command line
        # has been parsed. All of them keep their defaults.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Each worker makes every worker_count-th batch, and Grain puts them back in order.
        dataset = remaining.to_iter_dataset(grain.ReadOptions(1, 1))
        ahead = max(1, self._prefetch // self._worker_count)
        workers = grain.MultiprocessingOptions(self._worker_count, per_worker_buffer_size=ahead)
        return iter(dataset.mp_prefetch(workers, end_with_trainer))


def make_batch_iterator(
    documents: Documents,
    rows: Rows,
    *,
    max_target_length: int,
    global_batch_size: int,
    host: int = 0,
    num_hosts: int = 1,
    pad_last: bool = False,
    start: int = 0,
    worker_count: int = 0,
    prefetch_buffer_size: int = 8,
) -> BatchIterator:
    """This host's batches from global batch `start` on; see HostBatches and BatchIterator.

    global_batch_size: rows on all hosts. pad_last: for evaluation. worker_count: processes that
    prepare batches, 0: threads of this one. prefetch_buffer_size: batches prepared ahead.
    """
    batches = HostBatches(
        documents, rows, max_target_length, global_batch_size, host, num_hosts, pad_last
    )
    return BatchIterator(batches, start, worker_count, prefetch_buffer_size)
