"""Proof by numbers that engines will compute what was trained.

Loading proves nothing: a dropped rope field, absolute ids in d2t, a swapped concatenation all load.
So chains drafted by engine_head.py from the exported folder are compared with the trained
parameters, rounded to bf16, in drafts/rollout.py; and names, shapes and config.json with what each
engine needs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from MaxDraft.convert.differences import listed
from MaxDraft.convert.safetensors_files import SINGLE, read_header, read_json
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.convert.tensor_layout import stored_shape
from MaxDraft.drafts.drafter import DraftInputs
from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.drafts.eagle3.numpy_twin import EngineHead
from MaxDraft.drafts.eagle3.rollout import rollout_everywhere
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.params import Tree, flatten
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import TargetError

CHAIN_ROWS = (1, 4, 9, 16)  # rows before each chain
POSITIONS = 512  # the rows lie this far apart at most: far enough to see a lost rope scaling


class ExportError(CheckpointError):
    """An exported head that engines would not run as it was trained."""


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What was compared and how close it came."""

    chains: int
    steps: int
    largest_difference: float  # max |engine - trained| / rms(trained) of a step's logits
    tolerance: float

    def __str__(self) -> str:
        return (
            f"exported head checked: {self.chains} chains of {self.steps} steps, logits differ by "
            f"at most {self.largest_difference:.1e} of their root mean square "
            f"(tolerance {self.tolerance:.0e})"
        )


def check_export(
    folder: Path,
    params: Tree,
    dims: HeadDims,
    vocabulary: DraftVocabulary,
    capture: Sequence[int],
    steps: int = 3,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> CheckReport:
    """Compares an exported folder with the head it was made from; ExportError names what differs.

    params: the trained float32 masters. Embeddings and features of the comparison are random.
    """
    folder = Path(folder)
    problems = [*_file_problems(folder, dims), *_config_problems(folder, dims, capture)]
    _stop_on(folder, problems)
    try:
        head = EngineHead(folder)
    except SafetensorError as error:
        raise ExportError(f"{folder / SINGLE} cannot be loaded: {error}") from error
    problems = _vocabulary_problems(head, vocabulary)
    differences = chain_differences(head, params, dims, steps, seed)
    problems += [
        f"a chain after {rows} rows: the logits of step {k} differ by {difference:.1e} of their "
        f"root mean square from those of the trained head"
        for (rows, k), difference in differences.items()
        if not difference <= tolerance
    ]
    if problems:
        problems += _value_problems(folder, params, dims)
    _stop_on(folder, problems)
    return CheckReport(len(CHAIN_ROWS), steps, max(differences.values()), tolerance)


def _stop_on(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ExportError(f"engines would not run {folder} as it was trained:{listed(problems)}")


def _file_problems(folder: Path, dims: HeadDims) -> list[str]:
    if not (folder / SINGLE).is_file():
        return [f"there is no {SINGLE}"]
    try:
        found = read_header(folder / SINGLE)
    except CheckpointError as error:
        return [str(error)]
    D, V = dims.draft_vocab_size, dims.target_vocab_size
    expected = {"d2t": ("I64", (D,)), "t2d": ("BOOL", (V,))}
    for _, param in flatten(eagle3.head_params(dims)):
        expected[param.tensor] = ("BF16", stored_shape(param))
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: engines know no such tensor" for name in found if name not in expected]
    for name, (dtype, shape) in expected.items():
        if name in found and (found[name].dtype, found[name].shape) != (dtype, shape):
            problems.append(
                f"{name}: expected {dtype} {list(shape)}, "
                f"found {found[name].dtype} {list(found[name].shape)}"
            )
    return problems


def _config_problems(folder: Path, dims: HeadDims, capture: Sequence[int]) -> list[str]:
    try:
        config = read_json(folder / "config.json")
    except CheckpointError as error:
        return [str(error)]
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.target_vocab_size,
        "draft_vocab_size": dims.draft_vocab_size,
        "rope_theta": dims.rope.theta,
        "rms_norm_eps": dims.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in capture],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(capture),
            "use_aux_hidden_state": True,
        },
    }
    problems = [
        f"config.json: {field} is {config.get(field)!r}, must be {value!r}"
        for field, value in expected.items()
        if config.get(field) != value
    ]
    problems += [
        f"config.json: {field} is missing"
        for field in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
        if field not in config
    ]
    spellings = {
        "rope_theta and rope_scaling": {k: config.get(k) for k in ("rope_theta", "rope_scaling")},
        "rope_parameters": {"rope_parameters": config.get("rope_parameters")},
    }
    for name, fields in spellings.items():
        try:
            rope = hf_config.rope({**fields, "head_dim": dims.head_dim})
        except TargetError as error:
            problems.append(f"config.json, {name}: {error}")
            continue
        if rope != dims.rope:
            problems.append(
                f"config.json: {name} says {rope}, the head was trained with {dims.rope}"
            )
    return problems


def _vocabulary_problems(head: EngineHead, vocabulary: DraftVocabulary) -> list[str]:
    problems, trained = [], np.asarray(vocabulary.draft_to_target, np.int64)
    ids = head.target_ids()
    if not np.array_equal(ids, trained):
        absolute = np.array_equal(ids - np.arange(len(ids)), trained) and len(ids) > 1
        first = int(np.flatnonzero(ids != trained)[0])
        problems.append(
            f"d2t: draft token {first} maps to target id {ids[first]}, trained as {trained[first]}"
            + ("; it holds absolute ids where engines add an offset" if absolute else "")
        )
    if not np.array_equal(np.flatnonzero(head.t2d), trained):
        problems.append("t2d: does not mark the tokens of the draft vocabulary")
    return problems


def _rounded(params: Tree) -> Tree:
    """float32 NumPy, rounded to what bf16 holds."""
    return jax.tree.map(
        lambda x: np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32), params
    )


@functools.partial(jax.jit, static_argnames=("dims", "steps"))
def _trained_logits(
    params: Tree,
    embeddings: jax.Array,  # [T, H]
    features: jax.Array,  # [T, 3H]
    positions: jax.Array,  # int [T]
    dims: HeadDims,
    steps: int,
) -> jax.Array:  # [chains, K, D]
    """Logits of the training rollout at the last row before each chain, in float32."""
    T = len(embeddings)
    one_document = jnp.ones((1, T), jnp.int32)
    inputs = DraftInputs.from_rows(embeddings[None], features[None], positions[None], one_document)
    states = rollout_everywhere(params, dims, inputs, steps, T)
    last = jnp.asarray(CHAIN_ROWS) - 1
    return jnp.stack([eagle3.logits(params, dims, state[last]) for state in states], axis=1)


def chain_differences(
    head: EngineHead, params: Tree, dims: HeadDims, steps: int, seed: int = 0
) -> dict[tuple[int, int], float]:
    """(rows before the chain, step) -> max |engine - trained| / rms(trained)."""
    rng = np.random.default_rng(seed)
    rows, H = max(CHAIN_ROWS), dims.hidden_size
    embeddings = rng.standard_normal((rows + steps, H), np.float32)
    features = rng.standard_normal((rows + steps, 3 * H), np.float32)
    positions = np.sort(rng.choice(POSITIONS, rows + steps, replace=False)).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        reference = _trained_logits(_rounded(params), embeddings, features, positions, dims, steps)
    differences = {}
    for R, ours in zip(CHAIN_ROWS, np.asarray(reference), strict=True):
        engine = head.logits(embeddings[: R + steps], features[:R], positions[:R], steps)
        for k in range(steps):
            scale = max(float(np.sqrt(np.mean(ours[k] ** 2))), np.finfo(np.float32).tiny)
            differences[R, k] = float(np.abs(engine[k] - ours[k]).max()) / scale
    return differences


def _value_problems(folder: Path, params: Tree, dims: HeadDims) -> list[str]:
    """Tensors whose numbers are not the trained ones: where to look when the logits differ."""
    stored = load_file(folder / SINGLE)
    table = flatten(eagle3.head_params(dims))
    return [
        f"{param.tensor}: does not hold the trained numbers, as [out, in] in bfloat16"
        for (_, param), value in zip(table, jax.tree.leaves(_rounded(params)), strict=True)
        if not np.array_equal(
            stored[param.tensor].astype(np.float32), value.T if param.transposed else value
        )
    ]
