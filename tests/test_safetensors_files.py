"""Reading safetensors files and their index: every tensor's place, or one class of error.

Files are written by the safetensors library or by hand, never by the code under test.
"""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from any_json import JSON, SETTINGS, mutated, only_user_errors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from MaxDraft.convert.read_tensor import Source
from MaxDraft.convert.safetensors_files import (
    INDEX,
    SINGLE,
    open_safetensors,
    read_header,
    read_json,
)
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.layers.params import TensorLayout

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6, dtype=np.float32),
    "c.weight": np.arange(8, dtype=np.float32).reshape(2, 4),
}


def write_raw(file, header, data=b""):
    """A safetensors file of a header (bytes, or what JSON is made of) and the numbers' bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return file


def save_shards(folder, tensors=TENSORS, shards=2):
    """Splits the tensors over files and writes their index."""
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def numbers(tensors):
    return {name: tensor.read().tolist() for name, tensor in tensors.items()}


EXPECTED = {name: array.tolist() for name, array in TENSORS.items()}


# --------------------------------------------------------------------------------- one file
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_slice_reads_as_the_whole_does(tmp_path, dtype):
    whole = np.random.default_rng(0).standard_normal((70, 9)).astype(dtype)
    save_file({"pad": np.ones(3, np.bool_), "w": whole}, tmp_path / SINGLE)
    stored = open_safetensors(tmp_path)["w"]
    assert stored.shape == (70, 9)
    np.testing.assert_array_equal(stored.read(), whole)
    index = (slice(3, 69), slice(2, 5))
    np.testing.assert_array_equal(stored.read(index), whole[index])
    out = np.empty((3, 66), np.float32)
    Source(stored, TensorLayout("w", True), (9, 70), False).copy_to(
        out, (range(2, 5), range(3, 69))
    )
    np.testing.assert_array_equal(out, whole[index].T.astype(np.float32))


def test_a_truncated_file_is_named_with_both_sizes(tmp_path):
    save_file({"w": np.ones((8, 8), np.float32)}, tmp_path / SINGLE)
    raw = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(raw[:-10])
    with pytest.raises(CheckpointError, match=rf"says {len(raw)} bytes.* has {len(raw) - 10}"):
        open_safetensors(tmp_path)
    (tmp_path / SINGLE).write_bytes(raw[:20])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole"):
        open_safetensors(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes"):
        open_safetensors(tmp_path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN_HEADERS = {
    "no JSON": b"{not json",
    "no object": b"[1, 2]",
    "a field missing": {"w": {"dtype": "F32", "shape": [2]}},
    "a field too many": {"w": entry() | {"stride": [1]}},
    "an entry that is no object": {"w": 8},
    "more bytes than numbers": {"w": entry(offsets=[0, 12])},
    "fewer bytes than numbers": {"w": entry(offsets=[0, 4])},
    "bytes that begin late": {"w": entry(offsets=[4, 12])},
    "a negative size": {"w": entry(shape=[-2], offsets=[0, -8])},
    "a negative byte": {"w": entry(offsets=[-8, 0])},
    "a broken size": {"w": entry(shape=[2.9])},
    "a broken byte": {"w": entry(offsets=[0, 8.5])},
    "sizes that are true and false": {"w": entry("F32", [True, 2])},
    "bytes that are true and false": {"w": entry("U8", [1], [False, True])},
    "an infinite size": b'{"w": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}',
    "a number beyond float64": b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}',
    "an integer of 5,000 digits": b'{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}'
    % (b"7" * 5000),
    "a size that no file has": {"w": entry("U8", [1 << 60, 0], [0, 0])},
    "sizes whose product overflows": {"w": entry("U8", [1 << 40, 1 << 40, 0], [0, 0])},
    "a hundred dimensions": {"w": entry("U8", [1] * 100, [0, 1])},
    "a dtype that is no name": {"w": entry(["F32"])},
    "a name twice": b'{"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
    b'"w": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}',
    "deep nesting": b'{"w": ' + b"[" * 100_000,
    "tensors that overlap": {"v": entry(), "w": entry(offsets=[4, 12])},
    "a gap between tensors": {"v": entry(), "w": entry(offsets=[12, 20])},
    "half a surrogate pair": b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("broken", BROKEN_HEADERS)
def test_a_broken_header_is_an_error_that_names_the_file(tmp_path, broken):
    write_raw(tmp_path / SINGLE, BROKEN_HEADERS[broken], bytes(12))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has a broken .*header"):
        open_safetensors(tmp_path)


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    for length in (1 << 20, 1 << 40, (1 << 64) - 1):
        (tmp_path / SINGLE).write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(CheckpointError, match=f"announces a header of {length}"):
            open_safetensors(tmp_path)


def test_a_float_of_four_bits_has_half_a_byte_a_number(tmp_path):
    write_raw(tmp_path / SINGLE, {"w": entry("F4", [2, 4], [0, 4])}, bytes(4))
    with pytest.raises(CheckpointError, match=r"w in .* has dtype F4, which cannot be read"):
        open_safetensors(tmp_path)["w"].read()
    write_raw(tmp_path / SINGLE, {"w": entry("F4", [2, 4], [0, 8])}, bytes(8))
    with pytest.raises(CheckpointError, match="cannot lie at bytes 0 to 8"):
        open_safetensors(tmp_path)


# ------------------------------------------------------------------------- an index and its files
def test_an_index_must_name_what_is_there(tmp_path):
    weight_map = save_shards(tmp_path)
    assert numbers(open_safetensors(tmp_path)) == EXPECTED
    write_index(tmp_path, weight_map | {"ghost.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"ghost\.weight in model-00001"):
        open_safetensors(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names model-00002-of-00002"):
        open_safetensors(tmp_path)


def test_a_tensor_that_its_index_leaves_out_is_there(tmp_path):
    weight_map = save_shards(tmp_path)
    write_index(tmp_path, {name: file for name, file in weight_map.items() if name != "c.weight"})
    assert numbers(open_safetensors(tmp_path)) == EXPECTED


@pytest.mark.parametrize("path", ["../x.safetensors", "/x.safetensors", "a/../../x", "..\\x"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    write_index(folder, {"w": path})
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_safetensors(folder)


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "model", 5, None, ["model.safetensors"]])
def test_an_index_that_names_no_file_is_refused(tmp_path, path):
    write_index(tmp_path, {"w": path})
    with pytest.raises(CheckpointError, match=r"which is no file name|which is not in"):
        open_safetensors(tmp_path)


def test_an_index_of_the_single_file_beside_it_is_read(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    write_index(tmp_path, dict.fromkeys(TENSORS, SINGLE))
    assert numbers(open_safetensors(tmp_path)) == EXPECTED
    write_index(tmp_path, {"a.weight": SINGLE})
    assert numbers(open_safetensors(tmp_path)) == EXPECTED
    write_index(tmp_path, {"a.weight": SINGLE, "d.weight": SINGLE})
    with pytest.raises(CheckpointError, match=r"places d\.weight in model\.safetensors"):
        open_safetensors(tmp_path)


def test_an_index_may_add_a_file_to_the_single_one(tmp_path):
    head, *rest = TENSORS
    save_file({name: TENSORS[name] for name in rest}, tmp_path / SINGLE)
    save_file({head: TENSORS[head]}, tmp_path / "mtp.safetensors")
    write_index(tmp_path, {head: "mtp.safetensors", **dict.fromkeys(rest, SINGLE)})
    assert numbers(open_safetensors(tmp_path)) == EXPECTED


def test_a_single_file_with_the_tensors_of_its_shards_is_read(tmp_path):
    save_shards(tmp_path)
    save_file(TENSORS, tmp_path / SINGLE)
    assert numbers(open_safetensors(tmp_path)) == EXPECTED


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"a.weight": TENSORS["a.weight"] + 1}, "a.weight has other numbers in model.safetensors"),
        ({"a.weight": TENSORS["a.weight"].T.copy()}, r"a.weight is F32 \[4, 3\] in model"),
        ({"d.weight": TENSORS["a.weight"]}, "d.weight is only in model.safetensors"),
    ],
)
def test_a_single_file_that_differs_from_its_shards_is_refused(tmp_path, change, problem):
    save_shards(tmp_path)
    save_file(TENSORS | change, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=problem) as error:
        open_safetensors(tmp_path)
    assert "remove whichever is out of date" in str(error.value)


def test_an_index_without_its_shards_names_them(tmp_path):
    save_shards(tmp_path)
    save_file(TENSORS, tmp_path / SINGLE)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"remove the index where .* is whole"):
        open_safetensors(tmp_path)


# ------------------------------------------------------------------------- no safetensors at all
def test_pickles_are_not_read_and_the_way_out_is_said(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"pickles.*not read here[\s\S]*weights_only=True"):
        open_safetensors(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_safetensors(tmp_path / "nowhere")


def test_a_gguf_file_is_named_with_what_to_take_instead(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"Q4_K_M\.gguf.*llama\.cpp.*safetensors"):
        open_safetensors(tmp_path)


# ------------------------------------------------------------------------------------- any bytes
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": entry(shape=[2, 1], offsets=[0, 8]),
    "b": entry("BF16", [2], [8, 12]),
}


@SETTINGS
@given(st.binary(max_size=100), st.binary(max_size=20))
def test_any_bytes_are_tensors_or_a_checkpoint_error(tmp_path, header, data):
    file = tmp_path / SINGLE
    file.write_bytes(header + data)
    only_user_errors(CheckpointError, read_header, file)
    only_user_errors(CheckpointError, read_header, write_raw(file, header, data))


@SETTINGS
@given(mutated(HEADER))
def test_any_header_gives_tensors_that_can_be_read_or_an_error(tmp_path, header):
    file = write_raw(tmp_path / SINGLE, header, bytes(12))
    for name, tensor in (only_user_errors(CheckpointError, read_header, file) or {}).items():
        array = only_user_errors(CheckpointError, tensor.read)
        if array is not None:
            assert list(array.shape) == header[name]["shape"]
            assert array.tobytes() == bytes(array.nbytes)


@SETTINGS
@given(st.integers(0, 2**20), st.binary(min_size=1, max_size=4))
def test_a_damaged_file_gives_tensors_or_a_checkpoint_error(tmp_path, place, damage):
    file = tmp_path / SINGLE
    save_file(TENSORS, file)
    raw = bytearray(file.read_bytes())
    place %= len(raw)
    raw[place : place + len(damage)] = damage
    file.write_bytes(raw)
    for tensor in (only_user_errors(CheckpointError, read_header, file) or {}).values():
        only_user_errors(CheckpointError, tensor.read)


@SETTINGS
@given(mutated({"metadata": {}, "weight_map": {"a.weight": SINGLE, "b.weight": SINGLE}}))
def test_any_index_gives_tensors_or_a_checkpoint_error(tmp_path, index):
    if not (tmp_path / SINGLE).exists():
        save_file(TENSORS, tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(json.dumps(index))
    tensors = only_user_errors(CheckpointError, open_safetensors, tmp_path)
    assert tensors is None or numbers(tensors) == EXPECTED


@SETTINGS
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_of_a_json_file_are_a_value_or_an_error(tmp_path, raw):
    (tmp_path / "x.json").write_bytes(raw)
    value = only_user_errors(CheckpointError, read_json, tmp_path / "x.json")
    assert value is None or value == json.loads(raw)
