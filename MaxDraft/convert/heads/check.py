"""Proof by numbers that engines will compute what was trained.

Names, shapes, dtypes and config.json are compared with what the drafter's format says; then the
drafter's NumPy twin, which reads nothing but the exported folder, drafts beside the trained
parameters, and their logits must agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from MaxDraft.convert.differences import listed
from MaxDraft.convert.safetensors_files import SINGLE, read_header, read_json
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.convert.tensor_layout import stored_shape
from MaxDraft.drafts.drafter import Drafter
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.params import Tree, flatten


class ExportError(CheckpointError):
    """An exported drafter that engines would not run as it was trained."""


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What was compared and how close it came."""

    comparisons: int
    largest_difference: float  # max |twin - trained| / rms(trained) of a comparison's logits
    tolerance: float

    def __str__(self) -> str:
        return (
            f"exported head checked: logits of {self.comparisons} drafts differ from those of a "
            f"second implementation by at most {self.largest_difference:.1e} of their root mean "
            f"square (tolerance {self.tolerance:.0e})"
        )


def check_export(
    folder: Path,
    params: Tree,
    drafter: Drafter,
    vocabulary: DraftVocabulary,
    captured_layers: Sequence[int],
    steps: int = 3,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> CheckReport:
    """Compares an exported folder with the drafter it was made from; ExportError lists differences.

    params: the trained float32 masters.
    """
    folder = Path(folder)
    problems = [
        *_file_problems(folder, drafter),
        *_config_problems(folder, drafter, captured_layers),
    ]
    _raise_if_any(folder, problems)
    try:
        stored = load_file(folder / SINGLE)
    except SafetensorError as error:
        raise ExportError(f"{folder / SINGLE} cannot be loaded: {error}") from error
    file_format, dims = drafter.checkpoint_format, drafter.dims
    problems = file_format.vocabulary_problems(stored, vocabulary)
    differences = file_format.twin_differences(folder, params, dims, steps, seed)
    problems += [
        f"{name}: the logits differ by {difference:.1e} of their root mean square from those of "
        f"the trained head"
        for name, difference in differences.items()
        if not difference <= tolerance
    ]
    if problems:
        problems += _value_problems(stored, params, drafter)
    _raise_if_any(folder, problems)
    return CheckReport(len(differences), max(differences.values()), tolerance)


def _raise_if_any(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ExportError(f"engines would not run {folder} as it was trained:{listed(problems)}")


def _file_problems(folder: Path, drafter: Drafter) -> list[str]:
    if not (folder / SINGLE).is_file():
        return [f"there is no {SINGLE}"]
    try:
        stored = read_header(folder / SINGLE)
    except CheckpointError as error:
        return [str(error)]
    layout = drafter.checkpoint_format.vocabulary_layout(drafter.dims)
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in layout.items()}
    for _, param in flatten(drafter.params_table()):
        expected[param.tensor] = ("BF16", stored_shape(param))
    problems = [f"{name}: missing" for name in expected if name not in stored]
    problems += [f"{name}: engines know no such tensor" for name in stored if name not in expected]
    for name, (dtype, shape) in expected.items():
        if name in stored and (stored[name].dtype, stored[name].shape) != (dtype, shape):
            problems.append(
                f"{name}: expected {dtype} {list(shape)}, "
                f"found {stored[name].dtype} {list(stored[name].shape)}"
            )
    return problems


def _config_problems(folder: Path, drafter: Drafter, captured_layers: Sequence[int]) -> list[str]:
    try:
        config = read_json(folder / "config.json")
    except CheckpointError as error:
        return [str(error)]
    return drafter.checkpoint_format.config_problems(config, drafter.dims, captured_layers)


def _value_problems(stored: dict[str, np.ndarray], params: Tree, drafter: Drafter) -> list[str]:
    """Tensors whose numbers are not the trained ones: where to look when the logits differ."""
    rounded = [
        np.asarray(x, np.float32).astype(ml_dtypes.bfloat16) for x in jax.tree.leaves(params)
    ]
    return [
        f"{param.tensor}: does not hold the trained numbers, as [out, in] in bfloat16"
        for (_, param), value in zip(flatten(drafter.params_table()), rounded, strict=True)
        if not np.array_equal(stored[param.tensor], value.T if param.transposed else value)
    ]
