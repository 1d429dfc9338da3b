"""safetensors folders: names, shapes, dtypes, and where in which file every tensor lies.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the raw
numbers. That is little enough to read it here: every message can then name the file and the tensor.
Nothing in a file is ever executed, and what a header claims is checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from MaxDraft.convert.stored_tensor import DTYPES, CheckpointError, StoredTensor
from MaxDraft.strict_json import MAX_BYTES, JsonError, parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Bits of a number of every dtype that the format has, also of those that are not read here.
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "U32": 32, "U64": 64},
    **{"F64": 64, "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{code: 8 * dtype.itemsize for code, dtype in DTYPES.items()},
}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_RANK = (
    32  # dimensions; NumPy has 64, and quantized tensors are viewed with more than they have
)
_MAX_SIZE = 1 << 48  # of one dimension, and bytes of a file
_COMPARED = 256  # bytes from the middle of a tensor that tell it from another of its shape
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder with model.safetensors, or shards and their index.

    Headers only are read. CheckpointError where a file is missing, cut off or broken, and where a
    single file and an index beside it contradict each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    single, index = folder / SINGLE, folder / INDEX
    if not _is_file(index):
        if _is_file(single):
            return read_header(single)
        raise CheckpointError(_nothing_found(folder))
    weight_map = _weight_map(index)
    if not _is_file(single) or SINGLE in weight_map.values():
        return _sharded(folder, index, weight_map)
    return _agreeing(read_header(single), _sharded(folder, index, weight_map), folder)


def _agreeing(
    single: dict[str, StoredTensor], sharded: dict[str, StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """The single file's tensors, where the shards beside it hold the same ones."""
    for name in sorted(single.keys() | sharded.keys()):
        one, other = single.get(name), sharded.get(name)
        if one is None or other is None:
            problem = f"{name} is only in {(one or other).file.name}"
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            problem = (
                f"{name} is {one.dtype} {list(one.shape)} in {SINGLE} and {other.dtype} "
                f"{list(other.shape)} in {other.file.name}"
            )
        elif one.sample(_COMPARED) != other.sample(_COMPARED):
            problem = f"{name} has other numbers in {SINGLE} than in {other.file.name}"
        else:
            continue
        raise CheckpointError(
            f"{folder} holds two different models, {SINGLE} and the files of {INDEX}: {problem}; "
            f"remove whichever is out of date"
        )
    return single


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, as the index has it; no path leaves the folder."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise CheckpointError(f"{index} places {name} in {shard!r}, which is no file name")
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard:
            raise CheckpointError(f"{index} points outside its folder: {shard!r}; not followed")
    return weight_map


def _sharded(folder: Path, index: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    """The tensors of all files that the index names; the index decides where two hold one name."""
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if not _is_file(folder / shard):
            raise CheckpointError(
                f"{index} names {shard}, which is not in {folder}; download the missing file"
                + (f", or remove the index where {SINGLE} is whole" * _is_file(folder / SINGLE))
            )
        shards[shard] = read_header(folder / shard)
    absent = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if absent:
        raise CheckpointError(
            f"{index} places {absent[0]} in {weight_map[absent[0]]}, which does not hold it"
            + (f" (and {len(absent) - 1} more tensors likewise)" if len(absent) > 1 else "")
        )
    tensors = {name: tensor for held in shards.values() for name, tensor in held.items()}
    return tensors | {name: shards[shard][name] for name, shard in weight_map.items()}


def _is_file(path: Path) -> bool:
    """Whether there is such a file; not, where the system cannot even have such a name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_json(path: Path, *, nan: bool = False) -> Any:
    """The JSON value in a file; CheckpointError where it is missing or not JSON (strict_json.py).

    nan: accept NaN and Infinity.
    """
    if not _is_file(path):
        raise CheckpointError(f"there is no {path.name} in {path.parent}")
    try:
        with path.open("rb") as stream:
            return parse_json(stream.read(MAX_BYTES + 1), nan=nan)
    except (OSError, JsonError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one .safetensors file; CheckpointError where it is cut off or broken.

    The tensors must fill the file without gap or overlap, as the format asks.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > _MAX_HEADER or 8 + length > size:
                raise CheckpointError(
                    f"{file} is not a whole safetensors file: it has {size} bytes and announces a "
                    f"header of {length}"
                )
            header = parse_json(stream.read(length), max_bytes=_MAX_HEADER)
        if not isinstance(header, dict):
            raise JsonError("it is not a JSON object of tensors")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
            raise JsonError("its __metadata__ is no object of texts")
        tensors = {name: _stored(name, file, entry, 8 + length) for name, entry in header.items()}
        _check_offsets(tensors.values(), 8 + length)
    except JsonError as error:
        raise CheckpointError(f"{file} has a broken safetensors header: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        state = "cut off" if size < end else "too long"
        raise CheckpointError(
            f"{file} is {state}: its header says {end} bytes, the file has {size}; "
            f"download or copy it again"
        )
    return tensors


def _stored(name: str, file: Path, entry: Any, data: int) -> StoredTensor:
    """One entry of a header. data: the byte of the file at which the numbers begin."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise JsonError(f"{name} has not exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise JsonError(f"{name} has the dtype {dtype!r}, which is no name")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise JsonError(f"{name} has the shape {shape!r}, which is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise JsonError(f"{name} has the data_offsets {offsets!r}, which are no two bytes")
    begin, end = offsets
    bits = _BITS.get(dtype)
    if math.prod(filter(None, shape)) > _MAX_SIZE:
        raise JsonError(f"{name} has the shape {shape}, which no file can hold")
    # A dtype that is not known has no known size; the tensor can be listed and not be read.
    if end < begin or (bits is not None and math.prod(shape) * bits != 8 * (end - begin)):
        raise JsonError(f"{name} of {dtype} {shape} cannot lie at bytes {begin} to {end}")
    return StoredTensor(name, file, dtype, tuple(shape), data + begin, end - begin)


def _are_sizes(value: Any) -> bool:
    """Whether a JSON value is a list of whole numbers that an array's sizes can be."""
    return isinstance(value, list) and all(type(x) is int and 0 <= x <= _MAX_SIZE for x in value)


def _check_offsets(tensors: Iterable[StoredTensor], data: int) -> None:
    end = data
    for tensor in sorted(tensors, key=lambda t: (t.start, t.num_bytes)):
        if tensor.start != end:
            raise JsonError(
                f"{tensor.name} starts at byte {tensor.start}, the tensor before it ends at {end}"
            )
        end += tensor.num_bytes


def _nothing_found(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
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
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return (
            f"{folder} holds {ggufs[0]}, which is quantized for llama.cpp and not read here; give "
            f"the model's safetensors folder, from which it was converted"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    listing = f"; it holds {', '.join(others[:5])}" if others else ""
    return f"{folder} holds neither {SINGLE} nor {INDEX}{listing}"
