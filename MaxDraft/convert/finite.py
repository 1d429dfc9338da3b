"""NaN and infinity in weights, found while they are read.

One such number makes every loss NaN, and the training then blames its learning rate. NumPy's own
isfinite takes several times as long as reading bfloat16, so the bits are compared as integers: of a
float's bits without its sign, those from a certain number on are infinity and NaN.

    bits >= 0 1..1 0..0   as signed integers     positive infinity and NaN
    bits >= 1 1..1 0..0   as unsigned integers   negative infinity and NaN
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from MaxDraft.convert.stored_tensor import CheckpointError

# The least bits, without sign, that are no finite number; every dtype's exponent all ones, but of
# float8_e4m3fn, which has no infinity, the single code of NaN.
_FIRST = {
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}
# An exponent of two has no sign and one code of NaN, which lies where a negative NaN would.
_POWERS_OF_TWO = np.dtype(ml_dtypes.float8_e8m0fnu)


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of a float array (float32 or narrower) are finite; nothing is copied."""
    unsigned = array.view(f"u{array.dtype.itemsize}")
    if array.dtype == _POWERS_OF_TWO:
        return int(unsigned.max(initial=0)) < 0xFF
    first, sign = _FIRST[array.dtype], 1 << (8 * array.dtype.itemsize - 1)
    signed = array.view(f"i{array.dtype.itemsize}")
    return int(unsigned.max(initial=0)) < sign | first and int(signed.max(initial=0)) < first


def check_finite(name: str, array: np.ndarray) -> None:
    """CheckpointError naming the tensor that an array is a part of, if a number is not finite."""
    if is_finite(array):
        return
    count = int(np.count_nonzero(~np.isfinite(array.astype(np.float32))))
    raise CheckpointError(
        f"{name} holds NaN or infinity: {count:,} of {array.size:,} numbers, read as "
        f"{array.dtype}. Nothing can be trained with it: the file is damaged, or its model had "
        f"diverged; download it again or take another checkpoint"
    )
