"""What one training step costs: bytes and FLOPs of its program, and the positions it computes.

Nothing here runs a step. A program is compiled from shapes, so that a model that does not fit this
machine can be counted on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from MaxDraft.cost import compiled_flops, flops, traced_flops
from MaxDraft.drafts.drafter import Drafter
from MaxDraft.targets.dims import DecoderDims


def compile_program(program: Callable, shapes: Sequence[Any]) -> tuple[Any, dict[str, float]]:
    """Compiles a jitted function from shapes.

    -> the compiled program, and of one device: compile_seconds, and the bytes of what it computes
    in between (temporary_bytes), of its arguments, and of its results where they are not written
    over arguments.
    """
    start = time.perf_counter()
    compiled = program.lower(*shapes).compile()
    memory = compiled.memory_analysis()
    return compiled, {
        "compile_seconds": time.perf_counter() - start,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


def position_counts(
    segment_ids: np.ndarray, supervised: np.ndarray, *, position_block: int, devices: int
) -> dict[str, int]:
    """Tokens and positions of a batch [A, B, T].

    supervised: bool [A, B, T], positions that some step of the rollout supervises. A device drafts
    from those of its own rows, rounded up to a block of `position_block`.

    -> positions (all of them), tokens (those that are no padding), supervised_positions,
    computed_positions (those drafted from).
    """
    per_device = supervised.reshape(len(supervised), devices, -1).sum((0, 2))
    block = min(position_block, supervised.size // devices)
    return {
        "positions": segment_ids.size,
        "tokens": int((segment_ids > 0).sum()),
        "supervised_positions": int(supervised.sum()),
        "computed_positions": int((-(-per_device // block) * block).sum()),
    }


def model_flops(
    target: DecoderDims,
    drafter: Drafter,
    num_steps: int,
    document_lengths: np.ndarray,
    supervised_positions: int,
) -> dict[str, float]:
    """FLOPs that the method needs for a batch, by part; document_lengths float64 in tokens."""
    tokens = float(document_lengths.sum())
    length = float((document_lengths**2).sum() / tokens)  # a token's document, on average
    share = supervised_positions / tokens
    parts = flops.per_token(target, drafter, num_steps, length, share)
    return {name: value * tokens for name, value in parts.items()}


def program_flops(
    program: Callable, shapes: Sequence[Any], compiled: Any, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """FLOPs of all devices: traced_flops, and compiled_flops where the devices are CPUs."""
    platform = mesh.devices.flat[0].platform
    platform = {"gpu": "cuda"}.get(platform, platform)
    counts = {"traced_flops": traced_flops.count(program, *shapes, platform=platform)}
    if platform == "cpu":  # XLA's text is read as a CPU's compiler writes it
        counts["compiled_flops"] = mesh.size * compiled_flops.count(compiled.as_text())
    return counts
