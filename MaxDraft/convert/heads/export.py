"""A drafter as one folder that every serving engine reads: model.safetensors and config.json.

Tensors carry the published names, bf16, [out, in]; what the drafter's format adds says which tokens
it drafts. The folder is written beside its place, checked there, and renamed when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from MaxDraft import storage
from MaxDraft.convert.safetensors_files import SINGLE, read_json
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.drafts.drafter import Drafter
from MaxDraft.drafts.registry import drafters
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.params import Tree, flatten

FILES = (SINGLE, "config.json")


def export_head(
    folder: Path,
    params: Tree,
    drafter: Drafter,
    vocabulary: DraftVocabulary,
    target_config: Mapping[str, Any],
    captured_layers: Sequence[int],
    target_name: str,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Writes a drafter's folder and returns its path.

    Everything is written beside `folder` first, given to `check` (e.g. check.check_export), and
    renamed when it is whole: an earlier export stays until then. A folder that holds anything but
    an export is never replaced. CheckpointError where the drafter is not of this target.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder)
    dims = drafter.dims
    for name, ours in (("vocab_size", dims.target_vocab_size), ("hidden_size", dims.hidden_size)):
        if target_config.get(name) != ours:
            raise CheckpointError(
                f"{name}: the head has {ours}, the target's config.json "
                f"{target_config.get(name)!r}; this head was not trained for this target"
            )
    tensors = drafter_tensors(params, drafter, vocabulary)
    config = drafter.checkpoint_format.config(dims, captured_layers, target_config, target_name)
    storage.remove_abandoned(folder.parent)
    with storage.fresh_folder(folder) as fresh:
        save_file(tensors, fresh / SINGLE, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        (fresh / "config.json").write_text(text, encoding="utf-8")
        if check is not None:
            check(fresh)
        storage.replace_folder(fresh, folder)
    return folder


def drafter_tensors(
    params: Tree, drafter: Drafter, vocabulary: DraftVocabulary
) -> dict[str, np.ndarray]:
    """The tensors as stored: parameters bf16 [out, in], and those of the draft vocabulary.

    CheckpointError for a parameter of another shape, or one that is not finite.
    """
    dims, table = drafter.dims, drafter.params_table()
    D, V = vocabulary.size, vocabulary.target_vocab_size
    drafted = V if drafter.draft_vocab_size is None else drafter.draft_vocab_size
    if (drafted, dims.target_vocab_size) != (D, V):
        raise CheckpointError(
            f"the draft vocabulary has {D} of {V} tokens, the head {drafted} of "
            f"{dims.target_vocab_size}"
        )
    if jax.tree.structure(params) != jax.tree.structure(table):
        raise CheckpointError(f"the parameters to export are not those of drafter={drafter.kind}")
    tensors = {}
    for (_, param), value in zip(flatten(table), jax.tree.leaves(params), strict=True):
        host = _on_host(value, param.tensor)
        if host.shape != param.shape:
            raise CheckpointError(
                f"{param.tensor}: expected {list(param.shape)} ([in, out]), has {list(host.shape)}"
            )
        if not np.isfinite(host).all():
            raise CheckpointError(
                f"{param.tensor} holds numbers that are not finite; export an earlier checkpoint"
            )
        stored = host.T if param.transposed else host
        tensors[param.tensor] = np.ascontiguousarray(stored.astype(ml_dtypes.bfloat16))
    return tensors | drafter.checkpoint_format.vocabulary_tensors(vocabulary)


def _on_host(value: Any, name: str) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise CheckpointError(
            f"{name} is spread over several hosts; export from the run's checkpoint in one process"
        )
    return np.asarray(value, dtype=np.float32)


def check_replaceable(folder: Path) -> None:
    """CheckpointError where something stands in `folder` that no export wrote.

    Reads names and config.json only, so that a run can ask before it trains.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give export_path a folder")
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name not in FILES]
    if others or (names and not _is_export(folder)):
        raise CheckpointError(
            f"{folder} holds {', '.join((others or names)[:5])}, which no export wrote, "
            f"and is not replaced; move that away or give another export_path"
        )


def _is_export(folder: Path) -> bool:
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        return False
    names = config.get("architectures") if isinstance(config, dict) else None
    exported = [drafter.checkpoint_format.architecture for drafter in drafters().values()]
    return isinstance(names, list) and any(name in exported for name in names)
