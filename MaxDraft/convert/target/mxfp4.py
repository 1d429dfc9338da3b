"""MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss has it.

X_blocks uint8 [experts, out, in / 32, 16] and X_scales uint8 [experts, out, in / 32] are the
tensor X [experts, in, out]: two e2m1 numbers a byte, the low half first,

w = e2m1 * 2 ^ (scale - 127)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from MaxDraft.convert.stored_tensor import Index, Reader, StoredTensor
from MaxDraft.convert.tensor_layout import oriented
from MaxDraft.layers.params import TensorLayout

BLOCKS, SCALES = "_blocks", "_scales"
MX_BLOCK = 32  # inputs that share an exponent
# By its four bits: sign, two of exponent, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# By byte: its two numbers, the low half's first, as the eight bytes that they are in memory.
PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1).view(np.uint64)[:, 0]
# By the byte of a scale; 255 is no number.
POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


@dataclasses.dataclass(frozen=True)
class Mxfp4Tensor:
    """Blocks and scales that together are one tensor [experts, in, out]."""

    blocks: StoredTensor  # [experts, out, in / 2]
    scales: StoredTensor | None  # [experts, out, in / 32]; None: it is missing

    @property
    def name(self) -> str:
        return self.blocks.name.removesuffix(BLOCKS)

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, outputs, half = self.blocks.shape
        return (*lead, 2 * half, outputs)

    def problem(self, transposed: bool) -> str | None:
        """What is wrong with the scales, None where nothing is."""
        if self.scales is None:
            return f"{self.blocks.name}: its scales {self.name}{SCALES} are missing"
        *lead, inputs, outputs = self.shape
        expected = (*lead, outputs, inputs // MX_BLOCK)
        if self.scales.dtype != "U8" or self.scales.shape != expected:
            return (
                f"{self.scales.name}: expected U8 {list(expected)} beside {self.blocks.name}, "
                f"found {self.scales.dtype} {list(self.scales.shape)}"
            )
        return None

    def reader(self, layout: TensorLayout, shape: tuple[int, ...]) -> Reader:
        """A function from a range of the parameter to its float32 numbers."""
        as_stored = dataclasses.replace(layout, transposed=True)
        blocks = oriented(self.blocks.map(), as_stored, shape)  # [..., in / 2, out]
        scales = oriented(self.scales.map(), as_stored, shape)  # [..., in / 32, out]

        def read(index: Index) -> np.ndarray:
            *lead, rows, cols = index
            first, last = rows.start // MX_BLOCK, -(-rows.stop // MX_BLOCK)
            codes = blocks[(*lead, slice(first * MX_BLOCK // 2, last * MX_BLOCK // 2), cols)]
            # [..., out, in / 32]
            exponents = scales[(*lead, slice(first, last), cols)].swapaxes(-1, -2)
            numbers = PAIRS.take(codes.swapaxes(-1, -2)).view(np.float32)
            numbers = numbers.reshape(*exponents.shape, MX_BLOCK)
            numbers = (numbers * POWERS[exponents][..., None]).reshape(*exponents.shape[:-1], -1)
            inputs = slice(rows.start - first * MX_BLOCK, rows.stop - first * MX_BLOCK)
            return numbers.swapaxes(-1, -2)[..., inputs, :]

        return read
