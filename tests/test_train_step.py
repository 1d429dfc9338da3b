"""One optimizer step: accumulation, denominators, the update, and what a bad step leaves alone."""

import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import llama, random_head, random_target, tiny_dims, tiny_head_dims, training_programs

from MaxDraft import pyconfig, sharding
from MaxDraft.cost import flops
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.layers.rope import Rope
from MaxDraft.run import spec as run_spec
from MaxDraft.train_step import FrozenParams

ROOT = Path(__file__).resolve().parent.parent
TARGET = tiny_dims()
HEAD = tiny_head_dims(TARGET, draft_vocab_size=7)
IDS = np.array([0, 1, 3, 4, 7, 9, 11], np.int32)
LENGTH = 20


def config(*overrides, warmup=0.0):
    keys = [
        "dtype=float32",
        f"max_target_length={LENGTH}",
        "ttt_length=3",
        "attention_block_size=8",
        "vocab_block_size=8",
        "learning_rate=0.01",
        f"warmup_steps_fraction={warmup}",
        *overrides,
    ]
    keys = {key.split("=")[0]: key for key in keys}
    return pyconfig.initialize(["train.py", str(ROOT / "configs" / "base.yml"), *keys.values()])


def programs(settings, devices=1, total_steps=10):
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(1, devices, 1, 1),
        ("data", "fsdp", "expert", "tensor"),
    )
    return training_programs(settings, TARGET, HEAD, mesh, total_steps)


def frozen(**changes):
    target = random_target(TARGET) | changes
    return FrozenParams(target, jnp.asarray(IDS))


def rows(count=4):
    """Packed rows with very different numbers of assistant tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TARGET.vocab_size, (count, LENGTH)).astype(np.int32)
    segments = np.ones((count, LENGTH), np.int32)
    turns = np.zeros((count, LENGTH), np.int32)
    for row in range(count):
        turns[row, 15 - 4 * row : 18] = 1
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), segments.shape).copy()
    segments[0, 18:] = 0
    positions[0, 18:] = 0
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "turn_ids": turns}


def split(batch, micro_batches):
    return {name: jnp.asarray(x.reshape(micro_batches, -1, LENGTH)) for name, x in batch.items()}


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * max(np.abs(y).max(), 1e-6)


@pytest.mark.parametrize("denominator", ["supervised", "specforge"])
def test_accumulation_changes_no_gradient(denominator):
    built = programs(config(f"loss_denominator={denominator}"))
    results = []
    for micro_batches in (1, 2, 4):
        state, result = built.train(
            built.initialize(random_head(HEAD)), frozen(), split(rows(), micro_batches)
        )
        results.append((state.optimizer, result))
    for other in results[1:]:
        close(other, results[0])


def test_a_padded_row_more_changes_neither_loss_nor_metrics():
    built = programs(config())
    batch = rows()
    padded = {name: np.concatenate([x, np.zeros_like(x[:1])]) for name, x in batch.items()}
    one = built.train(built.initialize(random_head(HEAD)), frozen(), split(batch, 1))[1]
    two = built.train(built.initialize(random_head(HEAD)), frozen(), split(padded, 1))[1]
    close(two, one)


def test_eight_devices_take_the_same_step_as_one():
    batch = {name: np.concatenate([x, x]) for name, x in rows().items()}
    settings = config()
    one, eight = programs(settings), programs(settings, devices=8)
    expected = one.train(one.initialize(random_head(HEAD)), frozen(), split(batch, 1))
    found = eight.train(
        eight.initialize(random_head(HEAD)),
        frozen(),
        jax.device_put(split(batch, 1), eight.batch_shardings),
    )
    close(found[1], expected[1])
    # Moments are linear and quadratic in the gradient: they compare gradients without a division.
    close(found[0].optimizer, expected[0].optimizer, 1e-4)


def test_the_update_is_adamw_behind_a_global_norm_clip():
    settings = config("gradient_clipping_threshold=0.01", "adam_weight_decay=0.1")
    built = programs(settings)
    before = jax.device_get(random_head(HEAD))
    batch = split(rows(), 2)
    # Moments after one unclipped step with b1 = b2 = 0 are the gradient and its square.
    raw = programs(config("adam_b1=0.0", "adam_b2=0.0", "gradient_clipping_threshold=0.0"))
    moments = raw.train(raw.initialize(random_head(HEAD)), frozen(), batch)[0].optimizer
    gradient = jax.device_get(
        next(part.mu for part in jax.tree.leaves(moments, is_leaf=lambda x: hasattr(x, "mu")))
    )
    norm = math.sqrt(
        sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(gradient))
    )
    assert norm > 0.01

    state, result = built.train(built.initialize(random_head(HEAD)), frozen(), batch)
    assert float(result["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    for new, old, g in zip(
        jax.tree.leaves(state.params),
        jax.tree.leaves(before),
        jax.tree.leaves(gradient),
        strict=True,
    ):
        g = g.astype(np.float64) * 0.01 / norm
        # Bias correction makes the first step's moments g and g^2.
        step = g / (np.abs(g) + settings.adam_eps) + 0.1 * old.astype(np.float64)
        np.testing.assert_allclose(new - old, -0.01 * step, rtol=2e-3, atol=2e-7)


def test_muon_takes_matrices_and_adamw_the_rest():
    built = programs(config("opt_type=muon", "gradient_clipping_threshold=0"))
    before = jax.device_get(random_head(HEAD))
    state, _ = built.train(built.initialize(random_head(HEAD)), frozen(), split(rows(), 2))
    moved = jax.tree.map(lambda new, old: (np.asarray(new) - old) / 0.01, state.params, before)
    for name in ("fc", "q", "o"):
        # 0.2 sqrt(max(rows, cols)) times a matrix whose singular values Newton-Schulz brings to
        # about 1: between 0.7 and 1.2 with its published coefficients, where the rank is full.
        scale = 0.2 * math.sqrt(max(moved[name].shape))
        values = np.linalg.svd(moved[name] / scale, compute_uv=False)
        assert values.max() < 1.3, name
        assert np.median(values) > 0.5, name
    for name in ("norm", "lm_head"):  # AdamW's first step has size 1 wherever there is a gradient
        size = np.abs(moved[name])
        np.testing.assert_allclose(size[size > 0.5], 1.0, rtol=1e-2)
        assert (size > 0.5).mean() > 0.9, name


@pytest.mark.parametrize("loss", ["lk_hybrid", "lk_alpha"])
def test_the_acceptance_losses_raise_alpha(loss):
    built = programs(config(f"loss={loss}"), total_steps=30)
    state, alphas = built.initialize(None), []
    for _ in range(30):
        state, result = built.train(state, frozen(), split(rows(), 2))
        alphas.append(float((result["alpha_sum"] / result["supervised_positions"])[0]))
    assert alphas[-1] > alphas[0] + 0.1


def test_a_step_that_is_not_finite_changes_only_the_step_number():
    built = programs(config())
    broken = frozen(norm=jnp.full(TARGET.hidden_size, jnp.nan))
    before = jax.device_get(built.initialize(random_head(HEAD)))
    state, result = built.train(built.initialize(random_head(HEAD)), broken, split(rows(), 2))
    assert not np.isfinite(result["total_loss"])
    assert int(state.step) == 1
    after = jax.device_get(state)
    for x, y in zip(
        jax.tree.leaves((after.params, after.optimizer)),
        jax.tree.leaves((before.params, before.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_training_on_one_batch_lowers_its_loss():
    built = programs(config(), total_steps=30)
    state, losses = built.initialize(None), []
    for _ in range(30):
        state, result = built.train(state, frozen(), split(rows(), 2))
        losses.append(float(result["total_loss"]))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("devices", [1, 8])
def test_the_step_is_compiled_once(devices):
    built = programs(config(), devices)
    batch = {name: np.concatenate([x, x]) for name, x in rows().items()}
    batch = jax.device_put(split(batch, 1), built.batch_shardings)
    state, weights = built.initialize(None), frozen()
    for _ in range(3):
        state, _ = built.train(state, weights, batch)
    assert built.train._cache_size() == 1


def test_evaluation_pools_the_same_sums_as_the_training_step():
    built = programs(config())
    head = random_head(HEAD)
    evaluated = built.evaluate(head, frozen(), split(rows(), 2))
    trained = built.train(built.initialize(random_head(HEAD)), frozen(), split(rows(), 2))[1]
    close(evaluated, {name: trained[name] for name in evaluated})


def test_the_kernels_give_the_same_step(monkeypatch, interpreted_kernels):
    steps = []
    for kernel, block in (("xla", 8), ("tpu", 8), ("gpu", 16)):
        monkeypatch.setattr(run_spec, "attention_kernel", lambda *_, kernel=kernel: kernel)
        keys = "rollout_block_size=8", f"attention_block_size={block}"
        built = programs(config(*keys), devices=2)
        state, batch = built.initialize(random_head(HEAD)), split(rows(), 1)
        outputs = built.target(frozen(), batch)
        steps.append((outputs, *built.draft(state.params, frozen(), batch, outputs)))
    for other in steps[1:]:
        close(steps[0], other)


def test_bfloat16_has_float32s_gradient_within_rounding():
    # 8 bits a number, over a dozen roundings in a row: some percent.
    gradients = []
    for dtype in ("float32", "bfloat16"):
        built = programs(config(f"dtype={dtype}"))
        state, batch = built.initialize(random_head(HEAD)), split(rows(), 1)
        outputs = built.target(frozen(), batch)
        assert outputs.aux_hidden_states.dtype == jnp.dtype(dtype)
        loss, gradient, _ = built.draft(state.params, frozen(), batch, outputs)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
        gradients.append((float(loss), flat))
    (exact, a), (loss, b) = gradients
    assert loss == pytest.approx(exact, rel=0.02)
    assert a @ b > 0.995 * np.linalg.norm(a) * np.linalg.norm(b)
    assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=0.05)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_pallas_without_a_tpu_or_gpu_suggests_blockwise(platform):
    with pytest.raises(pyconfig.ConfigError, match="platform cpu; write attention=blockwise"):
        programs(config("attention=pallas", "attention_block_size=128"))
    chip = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([chip]))
    right = config("attention=pallas", "attention_block_size=256")
    assert run_spec.attention_kernel(right, mesh) == platform


def test_no_intermediate_holds_all_logits_or_scores():
    # [T, V], [T, D] and [T, T] must not exist for a whole row: blocks of 8 positions only.
    built = programs(config("rollout_block_size=8"))
    batch = split(rows(), 1)
    text = built.train.lower(built.initialize(random_head(HEAD)), frozen(), batch).as_text()
    rows_, length = 4, LENGTH
    assert f"tensor<{rows_}x{length}x{TARGET.hidden_size}xf32>" in text  # the shape is spelled so
    for forbidden in (
        f"{rows_}x{length}x{TARGET.vocab_size}xf32",
        f"{rows_}x8x{TARGET.vocab_size}xf32",  # eight positions in all, not of each row
        f"{rows_}x{length}x{len(IDS)}xf32",
        f"{rows_ * length}x{len(IDS)}xf32",
        f"x{length}x{length}xf32",
        f"x{rows_ * length}x{rows_ * length}xf32",
        f"x{length}x{2 * length}xf32",  # [keys, rows] of two heads that share a key
        f"x{rows_ * length}x{2 * rows_ * length}xf32",
    ):
        assert forbidden not in text


def test_flops_are_those_of_the_published_cost_table():
    # Llama-3.1-8B, K = 7, D = 32,000, T = 2048; GFLOP per token as in the method's cost table.
    rope = Rope(5e5, 128)
    parts = flops.per_token(
        llama(128256, 4096, 14336, 32, 32, 8, 128, rope),
        Eagle3(HeadDims(4096, 14336, 32, 8, 128, 32000, 128256, 1e-5, rope)),
        7,
        2048,
    )
    expected = {
        "target layers": 13.96,
        "target attention": 0.54,
        "target LM head": 1.05,
        "fc": 0.20,
        "draft layer": 7 * 1.46,
        "draft LM head": 7 * 0.79,
    }
    for name, gflop in expected.items():
        assert parts[name] / 1e9 == pytest.approx(gflop, rel=0.01), name
    assert sum(parts.values()) / 1e9 == pytest.approx(31.9, rel=0.01)


def test_an_impossible_mesh_is_named():
    with pytest.raises(sharding.ShardingError, match="ici_\\*_parallelism"):
        sharding.make_mesh(("data", "fsdp", "tensor"), (3, 1, 1), (1, 1, 1))
