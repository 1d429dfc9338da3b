"""How much memory loading a target takes, on one process and on two that share it.

    python3 end_to_end/loading_memory.py            (a checkpoint of 4 GB, in a temporary folder)
    python3 end_to_end/loading_memory.py --gigabytes 1 --json numbers.json

Writes a Qwen3-MoE with random bfloat16 weights, loads it in fresh processes on the CPU, where host
and device memory are one, and prints the most memory each process held, what it read, and the
largest piece that it held a second time before it was on the device. Two processes share the target
in each of the three ways there are: by fsdp, by experts, by tensor parallelism. Each process has a
copy of the files for itself, dropped from the system's page cache before: the pages that are there
afterwards are those it read from the disk. Exit status 0: every bound held.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

if __name__ == "__main__":  # importing this file changes nothing
    # The repository's root, not this folder: no file in it may shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import ml_dtypes
import numpy as np

MB = 1e6
AXES = ("data", "fsdp", "expert", "tensor")
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
RULES_OF = Path(__file__).resolve().parent.parent / "configs" / "base.yml"


# -------------------------------------------------------------------------------- the checkpoint
def target_table(config: dict, dtype=ml_dtypes.bfloat16):
    from MaxDraft.targets.registry import dims_from_config
    from MaxDraft.targets.table import decoder_params

    return decoder_params(dims_from_config(config), (0, 1, 2), dtype)


def sizes(config: dict) -> tuple[int, int]:
    """Bytes of the whole target, and of its largest layer."""
    from MaxDraft.convert.target.checkpoint import target_memory

    layers = config["num_hidden_layers"]
    whole = target_memory(target_table(config))
    return whole, target_memory(target_table(config | {"num_hidden_layers": layers + 1})) - whole


def write_checkpoint(folder: Path, config: dict) -> None:
    """config.json and shards of about a gigabyte."""
    from MaxDraft.convert.tensor_layout import stored_shape, tensor_names
    from MaxDraft.layers.params import flatten

    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: stored_shape(param)
        for _, param in flatten(target_table(config))
        for name in tensor_names(param, param.layouts[0])
    }
    shards, size = [{}], 0
    for name, shape in tensors.items():
        if size > 1e9:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * int(np.prod(shape))
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_shard(folder / file, shard)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """One safetensors file of random bfloat16 numbers."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    numbers = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(ml_dtypes.bfloat16)
    block = numbers.tobytes()
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        while end > 0:
            stream.write(block[: min(end, len(block))])
            end -= len(block)


# ------------------------------------------------------------------------------------ one process
def load_and_report(folder: Path, processes: int, number: int, address: str, axis: str) -> None:
    """Loads this process' part and prints what it took, as one line of JSON."""
    import jax
    from jax.sharding import Mesh

    if processes > 1:
        jax.distributed.initialize(address, processes, number)
    from MaxDraft import pyconfig
    from MaxDraft.convert import loading
    from MaxDraft.convert.target import checkpoint as target_checkpoint
    from MaxDraft.layers.params import shardings

    config = json.loads((folder / "config.json").read_text())
    table = target_table(config)
    rules = pyconfig.initialize(["", str(RULES_OF)]).logical_axis_rules
    shape = [processes if name == axis else 1 for name in AXES]
    mesh = Mesh(np.array(jax.devices()).reshape(shape), AXES)
    pieces = count_pieces(loading)
    drop_pages(folder)
    before, peak = status("VmHWM"), AnonymousPeak()
    tree = target_checkpoint.load_target(
        folder, table, shardings(table, mesh, rules) if processes > 1 else None
    )
    jax.block_until_ready(tree)
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    report = {
        "bytes_read": sum(pieces),
        "from_disk": sum(map(pages, folder.glob("*.safetensors"))),
        "largest_piece": max(pieces),
        "parameters": sum(shard.data.nbytes for shard in shards),
        "before": before,
        "peak": status("VmHWM"),
        "anonymous_peak": peak.stop(),
    }
    print(json.dumps(report), flush=True)
    if processes > 1:
        jax.distributed.shutdown()


def count_pieces(loading) -> list[int]:
    """Bytes of every piece that is read from now on, all of bfloat16 as in the files."""
    pieces, read = [], loading._read

    def counted(*args):
        piece = read(*args)
        pieces.append(piece.nbytes)
        return piece

    loading._read = counted
    return pieces


def drop_pages(folder: Path) -> None:
    """Takes the files' pages out of the system's cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if pages(file):
            raise SystemExit(f"{file.parent} is held in memory: set TMPDIR to a folder on a disk")


def pages(file: Path) -> int:
    """Bytes of a file that are in the system's page cache (mincore)."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        array = np.frombuffer(mapped, np.uint8)
        resident = (ctypes.c_ubyte * -(-len(array) // mmap.PAGESIZE))()
        where, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(len(array))
        if ctypes.CDLL(None, use_errno=True).mincore(where, size, resident):
            raise OSError(ctypes.get_errno(), "mincore")
        del array  # or the map cannot be closed
        return int((np.frombuffer(resident, np.uint8) & 1).sum()) * mmap.PAGESIZE


def status(field: str) -> int:
    """Bytes that /proc says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class AnonymousPeak:
    """The most memory that is no file's, looked at a hundred times a second."""

    def __init__(self):
        self._most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, status("RssAnon"))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._most


# --------------------------------------------------------------------------------------- together
def run(folder: Path, processes: int, axis: str = "fsdp") -> list[dict]:
    """The reports of fresh processes that split the target along a mesh axis."""
    folders = [folder, *(folder / f"copy-{number}" for number in range(1, processes))]
    for copy in folders[1:]:
        if not copy.exists():
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("copy-*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        # What is freed goes back to the system, instead of being kept for the next piece (glibc).
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    command = [sys.executable, __file__, f"--processes={processes}", f"--axis={axis}"]
    started = [
        subprocess.Popen(
            [*command, f"--number={number}", f"--address={address}", f"--folder={own}"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, own in enumerate(folders)
    ]
    lines = [process.communicate()[0].splitlines()[-1:] for process in started]
    if any(process.returncode for process in started) or not all(lines):
        raise SystemExit("a loading process failed")
    return [json.loads(line) for [line] in lines]


def measured(name: str, report: dict, whole: int) -> str:
    """A line of what a process reports."""
    over = report["peak"] - report["before"] - report["parameters"]
    return (
        f"{name}: made {report['bytes_read'] / MB:.0f} MB ({report['bytes_read'] / whole:.1%} of "
        f"the checkpoint) of {report['from_disk'] / MB:.0f} MB from the disk "
        f"({report['from_disk'] / whole:.1%}), largest piece {report['largest_piece'] / MB:.0f} "
        f"MB; most memory {report['peak'] / MB:.0f} MB = {report['before'] / MB:.0f} MB before "
        f"loading + {report['parameters'] / MB:.0f} MB parameters + {over / MB:.0f} MB (without "
        f"files {report['anonymous_peak'] / MB:.0f} MB)"
    )


def bounds_hold(report: dict, processes: int, whole: int, layer: int) -> bool:
    """Whether a process read only its part, and held less than a layer of it twice."""
    return (
        report["bytes_read"] < whole / processes * 1.01  # norms and routers are not split
        and report["from_disk"] < whole / processes * 1.05
        and report["largest_piece"] <= layer
        and report["peak"] - report["before"] - report["parameters"] < layer
    )


def measure(gigabytes: float, hidden_size: int, file: str) -> int:
    """Writes a checkpoint, loads it in each of the ways and prints the numbers -> exit status."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = CONFIG | {"num_hidden_layers": 4, "hidden_size": hidden_size}
        whole, layer = sizes(config)
        config["num_hidden_layers"] += max(0, round((gigabytes * 1e9 - whole) / layer))
        write_checkpoint(folder, config)
        whole, layer = sizes(config)
        print(f"checkpoint {whole / MB:.0f} MB, its largest layer {layer / MB:.0f} MB")
        all_hold, results = True, []
        for processes, axis in ((1, "fsdp"), (2, "fsdp"), (2, "expert"), (2, "tensor")):
            for number, report in enumerate(run(folder, processes, axis)):
                split = f" ({axis})" if processes > 1 else ""
                title = f"process {number + 1} of {processes}{split}"
                print(measured(title, report, whole), flush=True)
                all_hold &= bounds_hold(report, processes, whole, layer)
                results.append({"processes": processes, "axis": axis, **report})
    if file:
        content = {"checkpoint": whole, "largest_layer": layer, "results": results}
        Path(file).write_text(json.dumps(content, indent=2))
    print("every bound held" if all_hold else "FAILED: a bound did not hold")
    return 0 if all_hold else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--hidden-size", type=int, default=CONFIG["hidden_size"])
    parser.add_argument("--json", default="", help="file for all numbers, in bytes")
    for name in ("--folder", "--address", "--axis"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    for name in ("--processes", "--number"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.folder:
        return measure(options.gigabytes, options.hidden_size, options.json)
    load_and_report(
        Path(options.folder), options.processes, options.number, options.address, options.axis
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
