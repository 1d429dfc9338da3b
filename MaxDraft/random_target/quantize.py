"""Writes weights as published checkpoints quantize them: FP8 in blocks, MXFP4."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from MaxDraft.convert.target.mxfp4 import BLOCKS, E2M1, MX_BLOCK, SCALES


def plain(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """As it is."""
    yield name, array


def fp8(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Matrices as float8 with a scale for every 128 x 128, but embedding, head and router."""
    if array.ndim < 2 or name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight")):
        yield name, array
        return
    rows, cols = array.shape
    scale = np.empty((-(-rows // 128), -(-cols // 128)), np.float32)
    values = np.empty(array.shape, ml_dtypes.float8_e4m3fn)
    for a, b in np.ndindex(scale.shape):
        block = np.s_[128 * a : 128 * a + 128, 128 * b : 128 * b + 128]
        numbers = array[block].astype(np.float32)
        scale[a, b] = np.abs(numbers).max() / 448
        values[block] = (numbers / scale[a, b]).astype(values.dtype)
    yield name, values
    yield name + "_scale_inv", scale


def mxfp4(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Experts' matrices [E, in, out] as 4 bits a number with an exponent for every 32 inputs."""
    if array.ndim < 3:
        yield name, array
        return
    numbers = array.astype(np.float32).swapaxes(-1, -2)
    numbers = numbers.reshape(*numbers.shape[:-1], -1, MX_BLOCK)
    exponent = np.floor(np.log2(np.abs(numbers).max(-1))) - 2  # the largest number is 6 = 1.5 * 2^2
    scaled = np.ldexp(numbers, -exponent[..., None].astype(np.int32))
    code = np.abs(scaled[..., None] - E2M1).argmin(-1).astype(np.uint8)
    yield name + BLOCKS, code[..., ::2] | code[..., 1::2] << 4
    yield name + SCALES, (exponent + 127).astype(np.uint8)


QUANTIZERS = {None: plain, "fp8": fp8, "mxfp4": mxfp4}
