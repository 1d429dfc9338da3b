"""A step's cost as a table for people, from the numbers that benchmark.py writes as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(result: Mapping[str, Any]) -> str:
    """What was compiled and, where the step was run, measured."""
    lines = [str(result["setting"]), *_counts(result), *_flops(result)]
    if "attention_pairs" in result:
        pairs = result["attention_pairs"]
        lines.append(
            f"  attention        pairs of query and key computed / visible: target "
            f"{pairs['target']:.3f}, rollout {pairs['rollout']:.3f}"
        )
    if "step_seconds" in result:
        lines += _times(result)
    return "\n".join(lines)


def _counts(result: Mapping[str, Any]) -> list[str]:
    supervised, computed = result["supervised_positions"], result["computed_positions"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    return [
        f"  devices          {result['devices']}, {mesh}",
        f"  tokens           {result['tokens']:,} of {result['positions']:,} positions "
        f"({result['tokens'] / result['positions']:.1%})",
        f"  rollout          {supervised:,} positions supervised, {computed:,} computed "
        f"({computed / supervised:.3f} x)",
        f"  weights          {result['weights']}",
        f"  compile          {result['compile_seconds']:.1f} s",
        f"  bytes            {result['temporary_bytes'] / 2**20:,.0f} MiB temporary, "
        f"{result['argument_bytes'] / 2**20:,.0f} MiB arguments, a device",
    ]


def _flops(result: Mapping[str, Any]) -> list[str]:
    parts = result["model_flops"]
    model = sum(parts.values())
    lines = [f"  model FLOPs      {model / 1e9:,.1f} GFLOP a step"]
    lines += [
        f"    {name:<19}{value / 1e9:>12,.2f}  {value / model:6.1%}"
        for name, value in parts.items()
    ]
    for kind in ("traced", "compiled"):
        if f"{kind}_flops" not in result:
            continue
        flops = result[f"{kind}_flops"]
        if result["tokens_kind"] == "all":
            comparison = f"{flops / model:.3f} x the model's"
        else:
            comparison = "counted as if each row were one document and supervised everywhere"
        lines.append(
            f"  {kind + ' FLOPs':<17}{flops / 1e9:,.1f} GFLOP on all devices, {comparison}"
        )
    return lines


def _times(result: Mapping[str, Any]) -> list[str]:
    low, median, high = result["step_seconds"]
    data_sheet = f", {result['mfu']:.1%} of the data sheet" if "mfu" in result else ""
    parts = result["breakdown"]
    whole = sum(parts.values())
    return [
        f"  step             {median:.3f} s median, quartiles {low:.3f} to {high:.3f}, "
        f"{result['tokens_per_second_per_device']:,.0f} tokens/s/device",
        f"  MFU              {result['mfu_of_measured']:.1%} of the "
        f"{result['matmul_peak'] / 1e12:.3g} TFLOP/s measured in matrix products{data_sheet}",
        *(
            f"    {name:<19}{seconds:>10.3f} s  {seconds / whole:6.1%}"
            for name, seconds in parts.items()
        ),
    ]
