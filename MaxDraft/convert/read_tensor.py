"""A range of a parameter out of one tensor of a file, turned round and dequantized on the host.

The range is transposed where the file holds [out, in], and only what it covers is read.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from MaxDraft.convert.finite import check_finite
from MaxDraft.convert.stored_tensor import Index, Reader, StoredTensor, will_need
from MaxDraft.convert.target.fp8 import Fp8Tensor, ScaleTensor
from MaxDraft.convert.target.mxfp4 import SCALES, Mxfp4Tensor
from MaxDraft.convert.target.quantization import WeightTensor
from MaxDraft.convert.tensor_layout import as_stored, oriented
from MaxDraft.layers.params import TensorLayout

# A transposed or dequantized copy walks the file's rows in strips, so that both sides, and what is
# computed between them, stay in the CPU's cache.
_STRIP = 32

Ranges = tuple[range, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor, as what it holds of a parameter: [in, out], [experts, in, out], [size]."""

    tensor: WeightTensor
    layout: TensorLayout
    shape: tuple[int, ...]
    raw: bool  # quantized numbers stay as they are, as bytes

    def copy_to(self, out: np.ndarray, ranges: Ranges) -> None:
        """out[...] = parameter[ranges], converted to out's dtype."""
        read, tensor = self._reader(), self.tensor
        index = tuple(slice(r.start, r.stop) for r in ranges)
        computed = isinstance(tensor, Fp8Tensor | Mxfp4Tensor) and not self.raw
        if not isinstance(tensor, ScaleTensor):
            will_need(self._in_file(index))
        if len(index) < 2 or not (computed or self.layout.transposed):
            out[...] = read(index)
            self._check_finite(out)
            return
        # Strips of the file's rows, which are the parameter's last dimension where it is turned.
        axis = -1 if self.layout.transposed or isinstance(tensor, Mxfp4Tensor) else -2

        def copy_strip(strip: tuple[Index, Index]) -> None:
            there, here = strip
            out[here] = read(there)

        for _ in _threads().map(copy_strip, _strips(index, axis)):
            pass  # or what a thread raised would be lost
        self._check_finite(out)

    def _check_finite(self, out: np.ndarray) -> None:
        """CheckpointError where a number is not finite; bytes are checked for what they mean."""
        tensor = self.tensor
        if self.raw and isinstance(tensor, Fp8Tensor):
            out = out.view(tensor.values.map().dtype)
        elif self.raw and tensor.name.endswith(SCALES):
            out = out.view(ml_dtypes.float8_e8m0fnu)
        if not self.raw or out.dtype != np.uint8:
            check_finite(f"{tensor.name} in {tensor.file}", out)

    def _in_file(self, index: Index) -> np.ndarray:
        """The stored numbers that a range takes, where they lie."""
        if not isinstance(self.tensor, Mxfp4Tensor):
            return self._lying()[index]
        *lead, inputs, outputs = index
        pairs = slice(inputs.start // 2, -(-inputs.stop // 2))
        by_rows = dataclasses.replace(self.layout, transposed=True)
        return oriented(self.tensor.blocks.map(), by_rows, self.shape)[(*lead, pairs, outputs)]

    def _lying(self) -> np.ndarray:
        """The whole tensor in the order of the parameter; FP8 as bytes."""
        tensor = self.tensor
        if isinstance(tensor, Fp8Tensor):
            tensor = dataclasses.replace(tensor.values, dtype="U8")
        return oriented(
            tensor.map().reshape(as_stored(self.shape, self.layout)), self.layout, self.shape
        )

    def _reader(self) -> Reader:
        if isinstance(self.tensor, StoredTensor) or (
            isinstance(self.tensor, Fp8Tensor) and self.raw
        ):
            return self._lying().__getitem__
        return self.tensor.reader(self.layout, self.shape)


def _strips(index: Index, axis: int) -> Iterator[tuple[Index, Index]]:
    """(place in the parameter, place in the output) of every strip of every expert."""
    sizes = [1] * (len(index) - 2) + [at.stop - at.start for at in index[-2:]]
    sizes[axis] = _STRIP
    for starts in itertools.product(
        *(range(at.start, at.stop, size) for at, size in zip(index, sizes, strict=True))
    ):
        there = tuple(
            slice(start, min(start + size, at.stop))
            for start, size, at in zip(starts, sizes, index, strict=True)
        )
        here = tuple(
            slice(part.start - at.start, part.stop - at.start)
            for part, at in zip(there, index, strict=True)
        )
        yield there, here


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Strips are read and converted side by side: neither holds Python's lock."""
    return ThreadPoolExecutor(os.cpu_count(), "loading")
