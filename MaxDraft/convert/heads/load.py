"""A drafter from a folder: our export, a published head, or a speculators (vLLM) folder.

What the folder's names and fields mean is known to the drafter's format (drafts/). What computes
something else than the drafter does is refused, not dropped; what is called a copy of the target's
is compared with the target's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from MaxDraft.convert.differences import differences, listed
from MaxDraft.convert.loading import load_parameters
from MaxDraft.convert.safetensors_files import open_safetensors
from MaxDraft.convert.stored_tensor import CheckpointError, StoredTensor
from MaxDraft.convert.target.checkpoint import open_weights, read_config
from MaxDraft.convert.tensor_layout import find_layout, tensor_names
from MaxDraft.drafts import registry
from MaxDraft.drafts.drafter import Drafter, DrafterError
from MaxDraft.drafts.vocabulary import DraftVocabulary, VocabularyError
from MaxDraft.layers.params import Tree, flatten
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.fields import shown
from MaxDraft.targets.table import decoder_params

_ROWS_COMPARED = 4096  # at once, of an embedding


@dataclasses.dataclass(frozen=True)
class FolderContents:
    """A drafter's folder of which no weight has been read."""

    drafter: Drafter
    captured_layers: tuple[int, ...] | None  # 0-based; None: it names none, engines take defaults
    tensors: Mapping[str, StoredTensor]


@dataclasses.dataclass(frozen=True)
class LoadedHead:
    """A drafter's parameters, float32 as its table describes them, and its draft vocabulary."""

    params: Tree
    vocabulary: DraftVocabulary


@dataclasses.dataclass(frozen=True)
class TargetFolder:
    """The target beside which a drafter is loaded."""

    path: Path
    dims: DecoderDims


def open_head(folder: Path, kind: type[Drafter]) -> FolderContents:
    """Reads config.json and the tensors' names of a folder of this kind of drafter.

    CheckpointError where it holds another kind, or says something that is not understood.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), open_safetensors(folder)
    found = registry.kind_of_folder(config, tensors)
    if found != kind.kind:
        holds = f"a drafter of kind {found}" if found else "no drafter that is known"
        raise CheckpointError(
            f"{folder} holds {holds} (architectures {shown(config.get('architectures'))}), and "
            f"this run has drafter={kind.kind}" + (f"; set drafter={found}" if found else "")
        )
    try:
        dims, captured_layers = kind.checkpoint_format.read_config(config)
    except DrafterError as error:
        raise CheckpointError(f"the draft head in {folder} cannot be used: {error}") from error
    return FolderContents(kind(dims), captured_layers, tensors)


def warm_drafter(folder: Path, drafter: Drafter) -> Drafter:
    """The drafter that goes on from the one in a folder: with what no key of the run chooses."""
    saved = open_head(folder, type(drafter)).drafter
    dims = drafter.checkpoint_format.with_fields_of_checkpoint(drafter.dims, saved.dims)
    return dataclasses.replace(drafter, dims=dims)


def load_head(
    folder: Path,
    drafter: Drafter,
    captured_layers: Sequence[int],
    placement: Tree | None = None,  # tree of NamedSharding; None: one device
    target: TargetFolder | None = None,
) -> LoadedHead:
    """Reads a drafter; one CheckpointError lists all that is damaged or differs from this run's.

    target: what a token embedding in the folder is compared with, and what the captured layers are
    the defaults of where the folder names none. Without it, neither can be known.
    """
    folder, file_format = Path(folder), drafter.checkpoint_format
    contents = open_head(folder, type(drafter))
    dims, tensors = contents.drafter.dims, contents.tensors
    table = file_format.parameter_table(dims, tensors)
    layout = file_format.vocabulary_layout(dims)
    problems = differences(tensors, table)
    used = {param.tensor for _, param in flatten(table)} | layout.keys()
    used |= {file_format.embedding_copy, *file_format.training_only}
    problems += [
        f"{name}: drafter={drafter.kind} has no such tensor; the folder computes something else"
        for name in sorted(tensors.keys() - used)
    ]
    vocabulary, vocabulary_problems = _vocabulary(contents)
    problems += vocabulary_problems
    problems += file_format.differences(dims, drafter.dims)
    problems += _captured_layers_problems(contents, captured_layers, target)
    if file_format.embedding_copy in tensors and not problems:
        problems += _embedding_problems(tensors[file_format.embedding_copy], target)
    if problems or vocabulary is None:
        raise CheckpointError(f"the draft head in {folder} cannot be used:{listed(problems)}")
    return LoadedHead(load_parameters(folder, tensors, table, placement), vocabulary)


def _vocabulary(contents: FolderContents) -> tuple[DraftVocabulary | None, list[str]]:
    dims, tensors = contents.drafter.dims, contents.tensors
    file_format, problems = contents.drafter.checkpoint_format, []
    layout = file_format.vocabulary_layout(dims)
    for name, expected in layout.items():
        text = f"{name}: expected {' or '.join(expected.readable)} {list(expected.shape)}"
        tensor = tensors.get(name)
        if tensor is None:
            problems += [f"{text}, it is missing"] if expected.required else []
        elif tensor.shape != expected.shape or tensor.dtype not in expected.readable:
            problems.append(f"{text}, found {tensor.dtype} {list(tensor.shape)}")
    if problems:
        return None, problems
    values = {name: tensors[name].read() for name in layout if name in tensors}
    try:
        return file_format.read_vocabulary(values, dims), []
    except VocabularyError as error:
        return None, [str(error)]


def _captured_layers_problems(
    contents: FolderContents, captured_layers: Sequence[int], target: TargetFolder | None
) -> list[str]:
    wanted, named = tuple(captured_layers), contents.captured_layers
    if named == wanted:
        return []
    if named is not None:
        return [
            f"captured layers: the head reads {list(named)}, this run has {list(wanted)}; "
            f"set target_layer_ids={str(list(named)).replace(' ', '')}"
        ]
    if target is None:
        return [
            "captured layers: the head names none, which means the default ones of its target, and "
            "no target is given"
        ]
    defaults = contents.drafter.captured_layers((), target.dims.num_layers)
    if defaults == wanted:
        return []
    return [
        f"captured layers: the head names none, which means the defaults {list(defaults)}, this "
        f"run has {list(wanted)}; set target_layer_ids=[]"
    ]


def _embedding_problems(copy: StoredTensor, target: TargetFolder | None) -> list[str]:
    """Whether a folder's token embedding is the target's, in the head's or the target's dtype."""
    if target is None:
        return [f"{copy.name}: no target is given to compare this embedding with"]
    weights = open_weights(target.path)
    param = decoder_params(target.dims, (), np.float32)["embed"]
    original = weights.get(tensor_names(param, find_layout(weights, param))[0])
    advice = "the drafter reads the target's embedding; take a head that was trained with it"
    if not isinstance(original, StoredTensor):
        return [
            f"{copy.name}: the target's embedding is not there or is quantized, so that this one "
            f"cannot be compared with it; take it out of a copy of the folder if it is the same"
        ]
    if copy.shape != original.shape:
        return [
            f"{copy.name}: is {list(copy.shape)}, the target's {list(original.shape)}; {advice}"
        ]
    ours, theirs = copy.map(), original.map()
    for start in range(0, len(ours), _ROWS_COMPARED):
        rows = slice(start, start + _ROWS_COMPARED)
        a, b = np.array(ours[rows]), np.array(theirs[rows])
        if not (np.array_equal(a, b.astype(a.dtype)) or np.array_equal(a.astype(b.dtype), b)):
            different = (a.astype(np.float32) != b.astype(np.float32)).any(-1)
            return [
                f"{copy.name}: differs from the target's embedding, first at token "
                f"{start + int(np.flatnonzero(different)[0])}; {advice}"
            ]
    return []
