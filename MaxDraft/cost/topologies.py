"""Devices that need not be there, to compile for them, and what a device's data sheet promises."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.experimental import topologies

from MaxDraft.errors import UserError

# Peak FLOP/s of one device in bfloat16 products of matrices, by jax's device_kind: the vendors'
# data sheets, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

# Bytes of memory. An H200 is an H100 SXM with more memory. The first number is h100_sxm.txtpb's, of
# the specs that are named below; the second is h200.txtpb's 151,397,597,184, rounded down.
GPU_MEMORY = {"h100": 84_929_347_584, "h200": 150_000_000_000}

# What XLA's compiler asks of a GPU (xla/backends/gpu/target_config/specs of openxla/xla).
_HOPPER = """
platform_name: "CUDA"
device_description_str: "NVIDIA Hopper"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  device_memory_size: %d
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


class TopologyError(UserError):
    """Devices that are not known, or whose compiler is not installed."""


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice or of a host with GPUs.

    Args:
      topology: "v5e:2x4", "v5p:2x2x1" or "v6e:1x1", as Cloud TPU names slices; "h100:1" or
        "h200:8", GPUs of one host.

    Raises:
      TopologyError: the name is not known, or the compiler for these devices is not installed.
    """
    kind, _, count = topology.partition(":")
    if kind in GPU_MEMORY:
        platform = "cuda"
        options = {"target_config": _HOPPER % GPU_MEMORY[kind], "topology": f"1x1x{count}"}
    else:
        platform = "tpu"
        options = {"chips_per_host_bounds": (1, 1, 1)} if count == "1x1" else {}
    try:
        return topologies.get_topology_desc(topology, platform, **options).devices
    except Exception as error:  # of several types: the name is not known, or the compiler missing
        raise TopologyError(
            f"--topology {topology}: {str(error).splitlines()[0]}\n(it takes the compiler that "
            f"DEVICE={platform} bash setup.sh installs, and a name like v5e:1x1, v5e:2x4 or h100:8)"
        ) from error
