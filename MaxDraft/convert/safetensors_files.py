"""safetensors folders: names, shapes, dtypes, and any slice of a tensor without the rest.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the raw
numbers. That is little enough to read it here: every message can then name the file and the tensor,
and a slice is one memory map that is let go after the copy. Nothing in a file is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from MaxDraft.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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


def open_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder with model.safetensors, or shards and their index.

    Headers only are read. CheckpointError where a file is missing, cut off or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} holds {SINGLE} and {INDEX}: remove the one that is out of date"
        )
    if single.is_file():
        return read_header(single)
    if index.is_file():
        return _sharded(folder, index)
    raise CheckpointError(_nothing_found(folder))


def read_json(path: Path) -> Any:
    """The JSON value in a file; CheckpointError where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {path.name} in {path.parent}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one .safetensors file; CheckpointError where it is cut off or broken."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _MAX_HEADER or 8 + length > size:
            raise CheckpointError(
                f"{file} is not a whole safetensors file: it has {size} bytes and announces a "
                f"header of {length}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _stored(name, file, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} has a broken safetensors header: {error}") from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.num_bytes)):
        if tensor.start != end:
            raise CheckpointError(
                f"{file} has a broken safetensors header: {tensor.name} starts at byte "
                f"{tensor.start}, the tensor before it ends at {end}"
            )
        end += tensor.num_bytes
    if end != size:
        state = "cut off" if size < end else "too long"
        raise CheckpointError(
            f"{file} is {state}: its header says {end} bytes, the file has {size}; "
            f"download or copy it again"
        )
    return tensors


def _stored(name: str, file: Path, entry: Mapping[str, Any], data: int) -> StoredTensor:
    dtype, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
    if begin < 0 or end < begin or min(shape, default=0) < 0 or end - begin != expected:
        raise ValueError(f"{name} of {dtype} {list(shape)} cannot lie at bytes {begin} to {end}")
    return StoredTensor(name, file, dtype, shape, data + begin, end - begin)


def _sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files")
    weight_map = {name: str(shard) for name, shard in weight_map.items()}
    shards = {}
    for shard in sorted(set(weight_map.values())):
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard:
            raise CheckpointError(f"{index} points outside its folder: {shard!r}; not followed")
        if not (folder / path).is_file():
            raise CheckpointError(f"{index} names {shard}, which is not in {folder}")
        shards[shard] = read_header(folder / path)
    absent = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if absent:
        raise CheckpointError(
            f"{index} places {absent[0]} in {weight_map[absent[0]]}, which does not hold it"
            + (f" (and {len(absent) - 1} more tensors likewise)" if len(absent) > 1 else "")
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _nothing_found(folder: Path) -> str:
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds {pickles[0]} but no {SINGLE}. Such files are pickles, which can run "
            f"code when read, and are not read here. Where you trust the file, convert it once:\n"
            f'  python3 -c "import torch, safetensors.torch as s; '
            f"w = torch.load('{pickles[0]}', map_location='cpu', weights_only=True); "
            f"s.save_file({{k: v.contiguous().clone() for k, v in w.items()}}, '{SINGLE}')\"\n"
            f"in that folder (for several .bin files, load the model with transformers and call "
            f"save_pretrained)"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    found = f"; it holds {', '.join(others[:5])}" if others else ""
    return f"{folder} holds neither {SINGLE} nor {INDEX}{found}"
