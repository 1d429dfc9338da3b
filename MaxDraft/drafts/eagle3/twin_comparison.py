"""The trained head beside its NumPy twin: chains of drafts over random hidden states.

Loading an export proves nothing: a dropped rope field, absolute ids in d2t, a swapped concatenation
all load. So the logits of chains are compared, at positions far apart.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from MaxDraft.drafts.drafter import DraftInputs
from MaxDraft.drafts.eagle3 import head
from MaxDraft.drafts.eagle3.dims import NUM_CAPTURED, HeadDims
from MaxDraft.drafts.eagle3.numpy_twin import NumpyTwin
from MaxDraft.drafts.eagle3.rollout import rollout_everywhere
from MaxDraft.layers.params import Tree

CHAIN_STARTS = (1, 4, 9, 16)  # positions before each chain
POSITIONS = 512  # positions are drawn below this: far enough to see a lost rope scaling


def differences(
    folder: Path, params: Tree, dims: HeadDims, steps: int, seed: int = 0
) -> dict[str, float]:
    """-> chain and step: max |twin - trained| / rms(trained) of its logits [D]."""
    twin = NumpyTwin(folder)
    rng = np.random.default_rng(seed)
    length, H = max(CHAIN_STARTS), dims.hidden_size
    embeddings = rng.standard_normal((length + steps, H), np.float32)
    aux_hidden_states = rng.standard_normal((length + steps, NUM_CAPTURED * H), np.float32)
    positions = np.sort(rng.choice(POSITIONS, length + steps, replace=False)).astype(np.int32)
    rounded = jax.tree.map(
        lambda x: np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32), params
    )
    with jax.default_matmul_precision("highest"):
        trained = _chain_logits(rounded, embeddings, aux_hidden_states, positions, dims, steps)
    result = {}
    for start, ours in zip(CHAIN_STARTS, np.asarray(trained), strict=True):
        theirs = twin.logits(
            embeddings[: start + steps], aux_hidden_states[:start], positions[:start], steps
        )
        for k in range(steps):
            scale = max(float(np.sqrt(np.mean(ours[k] ** 2))), np.finfo(np.float32).tiny)
            difference = float(np.abs(theirs[k] - ours[k]).max()) / scale
            result[f"a chain after {start} positions, step {k}"] = difference
    return result


@functools.partial(jax.jit, static_argnames=("dims", "steps"))
def _chain_logits(
    params: Tree,
    embeddings: jax.Array,  # [T, H]
    aux_hidden_states: jax.Array,  # [T, 3H]
    positions: jax.Array,  # int [T]
    dims: HeadDims,
    steps: int,
) -> jax.Array:  # [chains, K, D]
    """Logits of the training rollout at the last position before each chain, in float32."""
    T = len(embeddings)
    one_document = jnp.ones((1, T), jnp.int32)
    inputs = DraftInputs.from_rows(
        embeddings[None], aux_hidden_states[None], positions[None], one_document
    )
    states = rollout_everywhere(params, dims, inputs, steps, T)
    last = jnp.asarray(CHAIN_STARTS) - 1
    return jnp.stack([head.logits(params, dims, state[last]) for state in states], axis=1)
