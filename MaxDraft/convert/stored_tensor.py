"""One tensor in a safetensors file: any slice of it without the rest.

A slice is one memory map that is let go after the copy.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from MaxDraft.errors import UserError

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

Index = tuple[slice, ...]
Reader = Callable[[Index], np.ndarray]  # from a range of a parameter to its numbers


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or not what it should be."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file; nothing of it is read before `read`, or before its map is copied."""

    name: str
    file: Path
    dtype: str  # the format's code: BF16, F32, F8_E4M3, ...
    shape: tuple[int, ...]
    start: int  # byte in the file
    num_bytes: int

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Copy of tensor[index] in the file's dtype."""
        return np.array(self.map()[index])

    def map(self) -> np.ndarray:
        """The tensor where it lies: only what is copied out of it is read."""
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.name} in {self.file} has dtype {self.dtype}, which cannot be read; "
                f"known are {', '.join(DTYPES)}"
            )
        dtype = DTYPES[self.dtype]
        if not self.num_bytes:
            return np.empty(self.shape, dtype)
        skipped = self.start % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as stream:
            bytes_ = mmap.mmap(
                stream.fileno(),
                skipped + self.num_bytes,
                access=mmap.ACCESS_READ,
                offset=self.start - skipped,
            )
        bytes_.madvise(mmap.MADV_RANDOM)  # or megabytes around every touched page are read
        return np.frombuffer(bytes_, np.uint8)[skipped:].view(dtype).reshape(self.shape)

    def sample(self, num_bytes: int) -> bytes:
        """Raw bytes from the middle of the tensor."""
        with self.file.open("rb") as stream:
            stream.seek(self.start + max(0, self.num_bytes - num_bytes) // 2)
            return stream.read(min(num_bytes, self.num_bytes))


def will_need(view: np.ndarray) -> None:
    """Asks the system to read what lies behind a view of `StoredTensor.map`, in large pieces."""
    if not view.size:
        return
    root = view
    while isinstance(root.base, np.ndarray):
        root = root.base
    file_map, address = root.base.obj, root.ctypes.data  # the memoryview's mmap
    for matrix in np.ndindex(view.shape[:-2]):
        low, high = (end - address for end in np.lib.array_utils.byte_bounds(view[matrix]))
        low -= low % mmap.PAGESIZE
        file_map.madvise(mmap.MADV_WILLNEED, low, high - low)
