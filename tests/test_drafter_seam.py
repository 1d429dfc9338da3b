"""A drafter of another kind trains, evaluates and is saved without a line outside its folder.

The second drafter is a toy: a block in one pass, two layers of keys, two captured layers, no draft
vocabulary, the target's frozen LM head. Its loss and gradient through the house's step are compared
with a dense computation that shares nothing with it but the parameters.
"""

from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_dims, training_programs
from toy_block_drafter import LAYERS, ToyBlock

from MaxDraft import pyconfig
from MaxDraft.drafts import registry
from MaxDraft.drafts.drafter import DrafterError, DrafterOptions
from MaxDraft.layers import params as parameters
from MaxDraft.targets import decoder
from MaxDraft.targets.table import decoder_params
from MaxDraft.train_step import FrozenParams

TARGET = tiny_dims()
DRAFTER = ToyBlock.from_options(DrafterOptions(draft_vocab_size=0), TARGET)
LAYER_IDS = DRAFTER.captured_layers((), TARGET.num_layers)
K, T = DRAFTER.dims.block_size - 1, 20
BASE = Path(__file__).parent.parent / "configs" / "base.yml"
DECAY = 0.7


def programs(devices=1, **keys):
    keys = {
        "dtype": "float32",
        "max_target_length": T,
        "ttt_length": 7,  # K is the drafter's own
        "ttt_loss_decay": DECAY,
        "attention_block_size": 8,
        "vocab_block_size": 8,
        "rollout_block_size": 4,
    } | keys
    config = pyconfig.initialize(
        ["train.py", str(BASE), *(f"{key}={value}" for key, value in keys.items())]
    )
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(1, devices, 1, 1), config.mesh_axes
    )
    return training_programs(config, TARGET, DRAFTER, mesh, captured_layers=LAYER_IDS)


@pytest.fixture(scope="module")
def problem():
    """-> parameters, frozen parameters, a batch of two rows with two documents each."""
    rng = np.random.default_rng(3)
    segments = np.repeat([[1, 2], [1, 2]], [11, 9], axis=1).astype(np.int32)
    turns = np.zeros((2, T), np.int32)
    turns[0, 3:11], turns[0, 13:18], turns[1, 6:11], turns[1, 12:20] = 1, 2, 1, 2
    batch = {
        "tokens": rng.integers(0, TARGET.vocab_size - 1, (2, T)).astype(np.int32),
        "segment_ids": segments,
        "positions": np.concatenate([np.arange(11), np.arange(9)])[None].repeat(2, 0),
        "turn_ids": turns,
    }
    batch = {name: jnp.asarray(x, jnp.int32)[None] for name, x in batch.items()}
    target = parameters.initialize(decoder_params(TARGET, LAYER_IDS, jnp.float32), 0)
    head = parameters.initialize(DRAFTER.params_table(), 1)
    ids = jnp.arange(TARGET.vocab_size, dtype=jnp.int32)
    return head, FrozenParams(target, ids), batch


def dense_loss(head, frozen, batch):
    """The same loss, a position and a slot at a time, with whole score matrices."""
    tokens, positions, segments, turns = (
        batch[name][0] for name in ("tokens", "positions", "segment_ids", "turn_ids")
    )
    embeddings, aux, last = decoder.forward(
        frozen.source, tokens, positions, segments, TARGET, LAYER_IDS, jnp.float32, T
    )
    teacher = jax.nn.softmax(decoder.logits(frozen.source, TARGET, last))
    mask_embedding = frozen.source["embed"][DRAFTER.dims.mask_token_id]
    lm_head = decoder.teacher_lm_head(frozen.source, frozen.draft_to_target)
    losses, weights = [], []
    for row in range(len(tokens)):
        fused = aux[row] @ head["fc"]
        for i in range(T):
            counts = [
                all(
                    i + j < T
                    and turns[row, i + j] == turns[row, i + 1] > 0
                    and segments[row, i + j] == segments[row, i]
                    for j in range(1, k + 3)
                )
                for k in range(K)
            ]
            if not counts[0]:
                continue
            x = jnp.stack([embeddings[row, i + 1], *[mask_embedding] * (K - 1)])
            context = fused[(segments[row] == segments[row, i]) & (np.arange(T) <= i)]
            for n in LAYERS:
                w = head["layers"][n]
                q = DRAFTER.heads(x @ w["q"])
                both = jnp.concatenate([context @ w["k"], x @ w["k"]])
                values = DRAFTER.heads(jnp.concatenate([context @ w["v"], x @ w["v"]]))
                scores = jnp.einsum("qnd,knd->nqk", q, DRAFTER.heads(both)) * q.shape[-1] ** -0.5
                mixed = jnp.einsum("nqk,knd->qnd", jax.nn.softmax(scores), values)
                x = x + mixed.reshape(x.shape) @ w["o"]
            log_q = jax.nn.log_softmax(x @ lm_head)
            for k in range(K):
                if counts[k]:
                    losses.append(-(teacher[row, i + 1 + k] * log_q[k]).sum())
                    weights.append(DECAY**k)
    return (jnp.stack(losses) * jnp.asarray(weights)).sum() / sum(weights)


def test_a_block_drafters_gradient_equals_a_dense_one(problem):
    head, frozen, batch = problem
    built = programs()
    outputs = built.target(frozen, batch)
    loss, gradient, sums = built.draft(head, frozen, batch, outputs)
    expected, expected_gradient = jax.value_and_grad(dense_loss)(head, frozen, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert sums["supervised_positions"].shape == (K,)
    for mine, theirs in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True
    ):
        assert harness.relative_error(mine, theirs) < 1e-4


@pytest.mark.parametrize("opt_type", ["adamw", "muon"])
def test_a_block_drafter_steps_alike_on_one_and_two_devices(problem, opt_type):
    head, frozen, batch = problem
    results = []
    for devices in (1, 2):
        built = programs(devices, opt_type=opt_type)
        placed = jax.device_put(batch, built.batch_shardings)
        evaluated = built.evaluate(head, frozen, placed)
        state, numbers = built.train(built.initialize(head), frozen, placed)
        for name, value in evaluated.items():
            assert harness.relative_error(numbers[name], value) < 1e-5
        results.append((numbers["total_loss"], numbers["gradient_norm"], state.params["fc"]))
    for one, two in zip(*results, strict=True):
        assert harness.relative_error(two, one) < 1e-4


def test_a_mask_tokens_embedding_reaches_the_drafts(problem):
    head, frozen, batch = problem
    built = programs()
    outputs = built.target(frozen, batch)
    before = built.draft(head, frozen, batch, outputs)[0]
    embed = frozen.source["embed"].at[DRAFTER.dims.mask_token_id].add(1.0)
    moved = FrozenParams(frozen.source | {"embed": embed}, frozen.draft_to_target)
    assert abs(float(built.draft(head, moved, batch, outputs)[0] - before)) > 1e-3


def test_a_drafter_is_found_by_its_kind():
    assert registry.drafter_class("eagle3").kind == "eagle3"
    with pytest.raises(DrafterError, match="drafter=eagle4 is not known; known: eagle3"):
        registry.drafter_class("eagle4")


def test_what_a_checkpoint_says_of_a_drafter_gives_it_back():
    assert ToyBlock.from_saved_dims(registry.identity(DRAFTER)["head"]) == DRAFTER
    assert registry.identity(DRAFTER)["drafter"] == "toy_block"
