"""Sums are pooled before they are divided, and every metric is what its name says."""

import dataclasses
import itertools

import harness
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import reference

from MaxDraft.drafts import alignment, losses, metrics
from MaxDraft.drafts.drafter import LossConfig
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.targets import decoder

K, B, T = 4, 6, 30
STEP_WEIGHTS = 0.8 ** np.arange(K)


def random_rows(seed=0):
    """Nested aligned rows, as serving's are, with some that no vocabulary has."""
    rng = np.random.default_rng(seed)
    aligned = np.logical_and.accumulate(rng.random((K, B, T)) < 0.8, axis=0)
    counted = aligned & (rng.random((K, B, T)) < 0.7)
    correct = counted & (rng.random((K, B, T)) < 0.6)
    return reference.Rows(
        aligned, counted, correct, loss=5 * rng.random((K, B, T)), alpha=rng.random((K, B, T))
    )


def half(rows, part):
    """Batch rows of one half; the halves are of unequal weight on purpose."""
    cut = np.s_[:, :2] if part == 0 else np.s_[:, 2:]
    return reference.Rows(*(getattr(rows, field.name)[cut] for field in dataclasses.fields(rows)))


def sums_of(rows):
    sums = metrics.sums(
        harness.from_rows(rows),
        jnp.asarray(harness.flat(rows.loss_mask)),
        jnp.asarray(harness.flat(rows.in_vocab_loss_mask)),
    )
    return {name: np.asarray(value) for name, value in sums.items()}


def total_of(rows, denominators, decay=0.8):
    weights = loss_weights(rows.in_vocab_loss_mask, jnp.asarray(denominators, jnp.float32), decay)
    return float((weights * harness.flat(rows.loss)).sum())


def loss_weights(counted, totals, decay=0.8):
    drafter = Eagle3(models.tiny_head_dims(models.tiny_dims(), 7))
    mask = jnp.asarray(harness.flat(counted))
    return drafter.loss_weights(mask, totals, LossConfig(decay=decay))


def test_metrics_equal_counting():
    rows = random_rows()
    ours, expected = metrics.finish(sums_of(rows), STEP_WEIGHTS), reference.metrics(rows)
    for name in ("acc", "cond_acc", "alpha", "sim_accept_length"):
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5)
    np.testing.assert_allclose(ours["loss_by_step"], expected["loss"], rtol=1e-5)
    assert ours["loss"] == pytest.approx(reference.total_loss(rows), rel=1e-5)
    for name, value in (
        ("kl", rows.loss),
        ("lk_alpha", -np.log(rows.alpha)),
        ("lk_hybrid", np.exp(-3 * rows.alpha) * (rows.loss - (1 - rows.alpha)) + 1 - rows.alpha),
    ):
        expected = reference.total_loss(dataclasses.replace(rows, loss=value))
        assert ours[name] == pytest.approx(expected, rel=1e-5)
    assert 0.2 < min(ours["cond_acc"]) < max(ours["cond_acc"]) < 0.8


def test_metrics_of_two_halves_pool_to_those_of_the_whole():
    rows = random_rows()
    parts = [sums_of(half(rows, part)) for part in (0, 1)]
    pooled = metrics.finish(
        {name: parts[0][name] + parts[1][name] for name in parts[0]}, STEP_WEIGHTS
    )
    whole = metrics.finish(sums_of(rows), STEP_WEIGHTS)
    for name, value in whole.items():
        np.testing.assert_allclose(pooled[name], value, rtol=1e-5)
    averaged = np.mean([metrics.finish(part, STEP_WEIGHTS)["acc"] for part in parts], axis=0)
    assert np.abs(averaged - whole["acc"]).max() > 1e-3  # dividing first reads otherwise


def test_the_losses_of_two_halves_add_up_to_that_of_the_whole():
    rows = random_rows()
    counts = rows.in_vocab_loss_mask.sum((1, 2))
    whole = total_of(rows, counts)
    assert whole == pytest.approx(reference.total_loss(rows), rel=1e-5)
    assert sum(total_of(half(rows, part), counts) for part in (0, 1)) == pytest.approx(whole)
    each = [half(rows, part) for part in (0, 1)]
    averaged = np.mean([total_of(part, part.in_vocab_loss_mask.sum((1, 2))) for part in each])
    assert abs(averaged - whole) > 1e-3  # dividing first reads otherwise


def test_gradients_of_two_halves_add_up_to_that_of_the_whole():
    layout = ["ppp1111111", "p111111111", "pppppp1111", "p11p11p111"]
    whole = reference.make_problem(layout)

    def only(keep):
        segments = whole.batch.segments * keep[:, None]
        turns = whole.batch.turns * keep[:, None]
        batch = dataclasses.replace(whole.batch, segments=segments, turns=turns)
        return dataclasses.replace(whole, batch=batch)

    all_rows = harness.run(whole, 1)
    counts = all_rows.in_vocab_loss_mask.sum((1, 2))
    parts = [
        harness.run(only(np.array(keep)), 1, counts=counts) for keep in ((1, 1, 0, 0), (0, 0, 1, 1))
    ]
    assert sum(part.total for part in parts) == pytest.approx(all_rows.total, rel=1e-5)
    summed = {name: sum(part.gradients[name] for part in parts) for name in parts[0].gradients}
    assert harness.worst_gradient(summed, all_rows.gradients)[1] < 1e-5


def test_steps_without_a_row_count_nothing_and_stay_finite():
    rows = random_rows()
    for name in ("loss_mask", "in_vocab_loss_mask", "correct"):
        getattr(rows, name)[2:] = False
    ours = metrics.finish(sums_of(rows), STEP_WEIGHTS)
    assert ours["acc"][2:] == ours["alpha"][2:] == ours["loss_by_step"][2:] == [0.0, 0.0]
    weights = loss_weights(
        rows.in_vocab_loss_mask, jnp.asarray(rows.in_vocab_loss_mask.sum((1, 2)), jnp.float32)
    )
    assert np.isfinite(weights).all()
    assert not weights[2:].any()


def test_sim_accept_length_is_a_mean_over_chains():
    cond_acc = [0.9, 0.5, 0.25, 0.8]
    reached = 1000.0
    sums = {name: np.ones(K) for name in metrics.SUMS}
    sums |= {
        "reached_positions": np.full(K, reached),
        "reached_correct_positions": reached * np.array(cond_acc),
    }
    expected = 0.0
    for hits in itertools.product([0, 1], repeat=K):
        chance = np.prod([a if hit else 1 - a for hit, a in zip(hits, cond_acc, strict=True)])
        accepted = hits.index(0) if 0 in hits else K  # the chain ends at its first miss
        expected += chance * (1 + accepted)  # and the target's own token follows
    assert metrics.finish(sums, STEP_WEIGHTS)["sim_accept_length"] == pytest.approx(expected)


def test_sim_accept_length_is_the_mean_chain_of_positions():
    rng = np.random.default_rng(0)
    rows = random_rows()
    rows.loss_mask[:] = rows.in_vocab_loss_mask[:] = True
    rows.correct[:] = rng.random((K, B, T)) < 0.6
    chains = [
        1 + sum(1 for _ in itertools.takewhile(bool, rows.correct[:, b, t]))
        for b in range(B)
        for t in range(T)
    ]
    ours = metrics.finish(sums_of(rows), STEP_WEIGHTS)["sim_accept_length"]
    assert ours == pytest.approx(np.mean(chains), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block", [1, 4, 50])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_full_vocabulary_teacher_equals_dense_logits(tied, block, share):
    rng = np.random.default_rng(0)
    last = rng.normal(size=(2, 11, 8)).astype(np.float32)
    weight = rng.normal(size=(8, 37)).astype(np.float32)
    params = {"embed": jnp.asarray(weight.T)} | ({} if tied else {"head": jnp.asarray(weight)})
    if not tied:
        params["embed"] = -params["embed"]  # not to be read
    wanted = rng.random((2, 11)) < share
    best, log_norm = decoder.teacher_argmax_and_logsumexp(
        params, models.tiny_dims(), jnp.asarray(last), jnp.asarray(wanted), block
    )
    logits = last.astype(np.float64) @ weight
    np.testing.assert_array_equal(best, np.where(wanted, logits.argmax(-1), 0))
    expected = np.where(wanted, np.log(np.exp(logits).sum(-1)), 0.0)
    np.testing.assert_allclose(log_norm, expected, rtol=1e-5)
    chosen = jnp.asarray([3, 4, 30])
    np.testing.assert_array_equal(decoder.teacher_lm_head(params, chosen), weight[:, [3, 4, 30]])


def test_a_uniform_head_has_loss_log_v():
    given = reference.make_problem(["p111111111"] * 2, draft_vocabulary=11)
    H = given.teacher.lm_head.shape[1]
    given.params["lm_head.weight"] = np.zeros((11, H))
    ours = harness.run(given, 1, gradients=False)
    for b, i in np.argwhere(ours.loss_mask[0]):
        logits = given.teacher.lm_head @ given.batch.final[b, i + 1]
        p = np.exp(logits) / np.exp(logits).sum()
        assert ours.rows.alpha[0, b, i] == pytest.approx(np.minimum(p, 1 / 11).sum(), rel=1e-4)
        assert ours.rows.loss[0, b, i] == pytest.approx(np.log(11), rel=1e-5)


def test_alpha_takes_probabilities_over_all_tokens():
    given = reference.make_problem(["p111111111"] * 2)
    given.params["lm_head.weight"] = np.zeros_like(given.params["lm_head.weight"])
    ours = harness.run(given, 1, gradients=False)
    draft_ids = np.arange(6) + given.d2t
    for b, i in np.argwhere(ours.loss_mask[0]):
        logits = given.teacher.lm_head @ given.batch.final[b, i + 1]
        p = (np.exp(logits) / np.exp(logits).sum())[draft_ids]
        assert ours.rows.alpha[0, b, i] == pytest.approx(np.minimum(p, 1 / 6).sum(), rel=1e-4)


def test_the_loss_is_logsumexp_minus_the_expected_logit():
    # -sum p log q = logsumexp(z) - sum p z, since p sums to one.
    given = reference.make_problem(["p111111111"] * 2)
    states = reference.document_states(
        given.params,
        given.head,
        given.teacher.embedding,
        given.batch.tokens[0],
        given.batch.aux[0],
        1,
    )
    ours = harness.run(given, 1, gradients=False)
    draft_ids = np.arange(6) + given.d2t
    for i in range(8):
        z = given.params["lm_head.weight"] @ reference.rms_norm(
            states[0, i], given.params["norm.weight"], given.head.eps
        )
        p = np.exp(given.teacher.lm_head[draft_ids] @ given.batch.final[0, i + 1])
        p /= p.sum()
        assert ours.rows.loss[0, 0, i] == pytest.approx(np.log(np.exp(z).sum()) - p @ z, rel=1e-4)


def test_teacher_in_vocab_looks_at_the_teachers_position():
    best = jnp.asarray([[4, 0, 1, 4, 2]])
    inside = jnp.asarray([True, True, True, False, False])
    found = alignment.teacher_in_vocab(best, inside, 2)
    assert np.asarray(found).astype(int).tolist() == [[[1, 1, 0, 1, 0]], [[1, 0, 1, 0, 0]]]


# ------------------------------------------------------------------------- the losses themselves
def loss_problem(seed=0, steps=3, rows=5, vocabulary=13, width=8):
    rng = np.random.default_rng(seed)
    behind = rows + steps - 1
    logits = 2 * rng.normal(size=(behind, vocabulary))
    full = np.log(np.exp(logits).sum(-1) + rng.random(behind))  # tokens outside the draft's
    return {
        "hidden": rng.normal(size=(steps, rows, width)),
        "lm_head": rng.normal(size=(width, vocabulary)),
        "logits": logits,
        "log_norm": full,
        "best": rng.integers(-1, vocabulary, behind),
        "weights": rng.random((steps, rows)) * (rng.random((steps, rows)) < 0.8),
    }


def fused_loss(given, loss):
    def total(hidden):
        teacher = losses.TeacherTargets.from_logits(
            *(jnp.asarray(given[name], jnp.float32) for name in ("logits", "log_norm")),
            jnp.asarray(given["best"], jnp.int32),
        )
        weights = jnp.asarray(given["weights"], jnp.float32)
        so_far = jnp.ones_like(lm_head)
        total, *rest = losses.fused_linear_cross_entropy(
            hidden, lm_head, so_far, teacher, weights, loss
        )
        return total, rest

    hidden, lm_head = (jnp.asarray(given[name], jnp.float32) for name in ("hidden", "lm_head"))
    (value, (rows, d_head)), d_hidden = jax.value_and_grad(total, has_aux=True)(hidden)
    undifferentiated = total(hidden)
    np.testing.assert_array_equal(undifferentiated[0], value)
    np.testing.assert_array_equal(undifferentiated[1][1], 1.0)  # d_head as it came
    return (value, rows), (d_hidden, d_head - 1)


def plain_loss(given, loss, stopped=None):
    """NumPy, float64, a row at a time -> total, loss [K, R], alpha [K, R].

    stopped: alpha [K, R] under lk_hybrid's stop_gradient, where it is not to move.
    """
    steps, rows = given["weights"].shape
    values, alphas = np.zeros((steps, rows)), np.zeros((steps, rows))
    for k, i in np.ndindex(steps, rows):
        z = given["hidden"][k, i] @ given["lm_head"]
        q = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        full = np.exp(given["logits"][i + k] - given["log_norm"][i + k])
        p = full / full.sum()
        cross_entropy, alpha = -(p * np.log(q)).sum(), np.minimum(full, q).sum()
        mix = np.exp(-3 * (alpha if stopped is None else stopped[k, i]))
        values[k, i] = {
            "kl": cross_entropy,
            "lk_hybrid": mix * cross_entropy + (1 - mix) * (1 - alpha),
            "lk_alpha": -np.log(alpha),
        }[loss]
        alphas[k, i] = alpha
    return (given["weights"] * values).sum(), values, alphas


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_each_loss_equals_its_formula_and_differences(loss):
    given = loss_problem()
    given["best"][:3] = (given["hidden"][0, :3] @ given["lm_head"]).argmax(-1)
    (total, rows), gradients = fused_loss(given, loss)
    expected, values, alphas = plain_loss(given, loss)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(rows.loss, values, rtol=1e-5)
    np.testing.assert_allclose(rows.cross_entropy, plain_loss(given, "kl")[1], rtol=1e-5)
    np.testing.assert_allclose(rows.alpha, alphas, rtol=1e-5)
    guesses = (given["hidden"] @ given["lm_head"]).argmax(-1)
    best = np.stack([given["best"][k : k + len(guesses[k])] for k in range(len(guesses))])
    np.testing.assert_array_equal(rows.correct, guesses == best)
    assert 0 < np.asarray(rows.correct).sum() < rows.correct.size
    rng = np.random.default_rng(1)
    for name, gradient in zip(("hidden", "lm_head"), gradients, strict=True):
        for _ in range(4):
            direction, size = rng.normal(size=given[name].shape), 1e-6

            def moved(by, name=name, direction=direction):
                changed = given | {name: given[name] + by * direction}
                return plain_loss(changed, loss, stopped=alphas)[0]

            slope = (moved(size) - moved(-size)) / (2 * size)
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_a_position_without_weight_has_no_gradient(loss):
    given = loss_problem(steps=1)
    given["weights"][:, 2] = 0.0
    given["hidden"][:, 2] = 1e30
    given["logits"][2] *= 1000
    given["log_norm"][2] = 0.0  # exp(log sum - 0) overflows
    (total, _), (d_hidden, d_head) = fused_loss(given, loss)
    assert np.isfinite(total)
    assert np.isfinite(d_head).all()
    assert not np.asarray(d_hidden[:, 2]).any()


def test_lk_hybrid_moves_from_kl_to_acceptance():
    given = loss_problem()
    _, kl, alphas = plain_loss(given, "kl")
    hybrid = np.asarray(fused_loss(given, "lk_hybrid")[0][1].loss)
    share = (hybrid - (1 - alphas)) / (kl - (1 - alphas))
    np.testing.assert_allclose(share, np.exp(-3 * alphas), rtol=1e-4)
