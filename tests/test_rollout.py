"""Rollout, loss and gradients equal a slow reference, and depend on nothing they must not see."""

import dataclasses

import harness
import numpy as np
import pytest
import reference

TOLERANCE = 1e-4  # max |a-b| / max |b|, float32 at highest precision against float64

# Prompts, several turns, holes in the mask, turns that touch, short and long documents, pads.
LAYOUT = ("ppp11111pp2222|pp11111..", "p1111111p1p222|pp1111222", "p1|pp11|p111111111111111p")
SWITCHES = [(a, d) for a in ("serving", "specforge") for d in ("supervised", "specforge")]


def problem(**changes):
    return reference.make_problem(LAYOUT, **changes)


def whole_vocabulary():
    """D = V, and as many key heads as query heads."""
    head = reference.Head(2, 2, 8, theta=500.0, eps=1e-3)
    return problem(seed=1, draft_vocabulary=11, head=head)


def assert_values_equal(ours, rows, denominator):
    np.testing.assert_array_equal(ours.loss_mask, rows.loss_mask)
    np.testing.assert_array_equal(ours.in_vocab_loss_mask, rows.in_vocab_loss_mask)
    assert (rows.in_vocab_loss_mask.sum((1, 2)) > 0).all(), (
        "the layout supervises no position at some step"
    )
    at = rows.loss_mask
    np.testing.assert_array_equal(ours.rows.correct[at], rows.correct[at])
    for k in range(len(at)):
        aligned = rows.loss_mask[k]
        for name in ("loss", "alpha"):
            mine, theirs = getattr(ours.rows, name)[k], getattr(rows, name)[k]
            assert harness.relative_error(mine[aligned], theirs[aligned]) < TOLERANCE, (name, k)
    total = reference.total_loss(rows, denominator=denominator)
    assert abs(ours.total - total) < TOLERANCE * total
    expected = reference.metrics(rows)
    np.testing.assert_allclose(ours.metrics["loss_by_step"], expected["loss"], rtol=TOLERANCE)
    for name in ("acc", "cond_acc", "alpha", "sim_accept_length"):
        np.testing.assert_allclose(ours.metrics[name], expected[name], rtol=TOLERANCE)


def directional(problem, name, direction, steps, switches, size=1e-5):
    """Central difference of the reference total along one direction of one parameter."""
    alignment, denominator = switches

    def total(moved):
        params = problem.params | {name: problem.params[name] + moved * direction}
        rows = reference.rollout(dataclasses.replace(problem, params=params), steps, alignment)
        return reference.total_loss(rows, denominator=denominator)

    return (total(size) - total(-size)) / (2 * size)


CASES = [
    pytest.param(problem, 1, id="1-D<V"),
    pytest.param(problem, 3, id="3-D<V"),
    pytest.param(problem, 7, id="7-D<V", marks=pytest.mark.slow),
    pytest.param(whole_vocabulary, 2, id="2-D=V"),
]


@pytest.mark.parametrize(("make", "steps"), CASES)
def test_losses_and_metrics_equal_the_reference(make, steps):
    given = make()
    for alignment in ("serving", "specforge"):
        rows = reference.rollout(given, steps, alignment)
        for denominator in ("supervised", "specforge"):
            ours = harness.run(given, steps, alignment, denominator)
            assert_values_equal(ours, rows, denominator)


@pytest.mark.parametrize(("make", "steps"), CASES)
def test_gradients_of_all_parameters_equal_autograd(make, steps):
    pytest.importorskip("torch")
    given = make()
    for switches in SWITCHES:
        ours = harness.run(given, steps, *switches)
        total, gradients = reference.torch_total(given, steps, *switches)
        assert abs(ours.total - total) < TOLERANCE * total
        name, error = harness.worst_gradient(ours.gradients, gradients)
        assert error < TOLERANCE, (switches, name, error)


def test_gradients_equal_finite_differences():
    # One random direction through all entries of a parameter: a wrong entry shows in the product.
    given, steps, switches = problem(), 3, ("serving", "supervised")
    ours = harness.run(given, steps, *switches)
    rng = np.random.default_rng(0)
    for name, gradient in ours.gradients.items():
        direction = rng.normal(size=gradient.shape)
        expected = directional(given, name, direction, steps, switches)
        product = np.sum(gradient * direction)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(gradient.size)
        assert abs(product - expected) < TOLERANCE * scale, (name, product, expected)


def assert_same(ours, expected):
    assert ours.total == pytest.approx(expected.total, rel=1e-5)
    at = expected.loss_mask
    for name in ("loss", "alpha", "correct"):
        mine, theirs = getattr(ours.rows, name)[at], getattr(expected.rows, name)[at]
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    assert harness.worst_gradient(ours.gradients, expected.gradients)[1] < 1e-5


def test_block_sizes_change_nothing():
    whole = harness.run(problem(), 3, attention_block=64, vocab_block=23, row_block=69)
    for attention, vocab, rows in ((5, 7, 1), (4, 5, 7), (64, 23, 16)):
        blocks = {"attention_block": attention, "vocab_block": vocab, "row_block": rows}
        assert_same(harness.run(problem(), 3, **blocks), whole)


@pytest.mark.parametrize("alignment", ["serving", "specforge"])
def test_rolling_out_unsupervised_positions_changes_nothing(alignment):
    gathered = harness.run(problem(), 3, alignment)
    share = gathered.loss_mask.any(0).mean()
    assert 0.2 < share < 0.9  # of the rows are rolled out
    assert_same(harness.run(problem(), 3, alignment, every_position=True), gathered)


def packed_elsewhere(given, placement, length=23):
    """The documents of a problem laid out anew: placement lists, per row, (row, start, end)."""
    arrays = {"tokens": 0, "turns": 0, "segments": 0, "positions": 0, "aux": 7.0, "final": -7.0}
    batch = given.batch
    out = {}
    for name, pad in arrays.items():
        old = getattr(batch, name)
        new = np.full((len(placement), length, *old.shape[2:]), pad, old.dtype)
        for row, documents in enumerate(placement):
            at = 0
            for number, (b, start, end) in enumerate(documents, 1):
                part = old[b, start:end]
                new[row, at : at + end - start] = number if name == "segments" else part
                at += end - start
        out[name] = new
    return dataclasses.replace(given, batch=reference.Batch(**out))


ALONE = [[(2, 6, 23)], [(0, 0, 14)], [(1, 14, 23)]]
BEHIND_OTHERS = [[(2, 2, 6), (2, 6, 23)], [(1, 14, 23), (0, 0, 14)], [(0, 14, 21), (1, 14, 23)]]


def test_a_document_has_the_same_losses_alone_and_behind_another():
    given, steps = problem(), 3
    alone = harness.run(packed_elsewhere(given, ALONE), steps, "specforge")
    behind = harness.run(packed_elsewhere(given, BEHIND_OTHERS), steps, "specforge")
    for row, (size, start) in enumerate(((17, 4), (14, 9), (9, 7))):
        here, there = np.s_[:, row, :size], np.s_[:, row, start : start + size]
        at = alone.loss_mask[here]
        assert at.any()
        np.testing.assert_array_equal(at, behind.loss_mask[there])
        for name in ("loss", "alpha", "correct"):
            mine, theirs = getattr(alone.rows, name)[here], getattr(behind.rows, name)[there]
            np.testing.assert_allclose(mine[at], theirs[at], rtol=1e-4)


def test_padding_changes_no_metric_loss_or_gradient():
    short = harness.run(packed_elsewhere(problem(), ALONE, 23), 1)
    long = harness.run(packed_elsewhere(problem(), ALONE, 46), 1)
    assert short.total == pytest.approx(long.total, rel=1e-5)
    for name, value in short.metrics.items():
        np.testing.assert_allclose(long.metrics[name], value, rtol=1e-5)
    assert harness.worst_gradient(long.gradients, short.gradients)[1] < 1e-5


def test_a_position_reads_its_prefix_and_chain_alone():
    # One document of n tokens. What x[t] may change is worked out from the text: it enters the
    # step-0 key of row t-1, which rows >= t-1 see at all steps, and the chain of row i at step
    # t-1-i. A feature enters at its own row's start and through its step-0 key.
    steps, n, wide = 3, 23, reference.make_problem(["p" + "1" * 22] * 24, seed=4)
    batch = wide.batch
    for name in ("tokens", "aux", "final"):
        getattr(batch, name)[:] = getattr(batch, name)[0]
    before = harness.run(wide, steps, gradients=False).rows.loss[:, 23]
    tokens, aux = batch.tokens.copy(), batch.aux.copy()
    for t in range(n):
        tokens[t, t] = (tokens[t, t] + 3) % 11
        aux[t, t] += 1.0
    by_token, by_feature = (
        harness.run(
            dataclasses.replace(wide, batch=dataclasses.replace(batch, **change)),
            steps,
            gradients=False,
        )
        for change in ({"tokens": tokens}, {"aux": aux})
    )
    for t in range(n):
        for k in range(steps):
            for i in range(n - 2 - k):  # supervised positions
                changed = abs(by_token.rows.loss[k, t, i] - before[k, i]) > 1e-6
                assert changed == (t >= 1 and i >= t - 1 - k), ("token", t, k, i)
                changed = abs(by_feature.rows.loss[k, t, i] - before[k, i]) > 1e-6
                assert changed == (i >= t), ("feature", t, k, i)


def test_a_wrong_shift_would_be_noticed():
    # The layouts tell the right version from the well-known wrong ones by far more than rounding.
    given, steps = problem(), 3
    right = reference.total_loss(reference.rollout(given, steps))
    unshifted = dataclasses.replace(
        given, batch=dataclasses.replace(given.batch, tokens=np.roll(given.batch.tokens, 1, 1))
    )
    assert abs(harness.run(unshifted, steps).total - right) > 100 * TOLERANCE * right
    assert abs(harness.run(given, steps, "specforge").total - right) > 100 * TOLERANCE * right
    assert abs(harness.run(given, steps).total - right) < TOLERANCE * right


def test_an_undraftable_argmax_is_wrong_but_not_trained():
    given = problem()
    inside = given.d2t + np.arange(len(given.d2t))
    outside = np.setdiff1d(np.arange(11), inside)
    # The last normed state gets one large component that only an undraftable token reads.
    final = given.batch.final.copy()
    final[..., 0] = 50.0
    lm_head = given.teacher.lm_head.copy()
    lm_head[:, 0] = 0.0
    lm_head[outside[0], 0] = 1.0
    shut = dataclasses.replace(
        given,
        teacher=dataclasses.replace(given.teacher, lm_head=lm_head),
        batch=dataclasses.replace(given.batch, final=final),
    )
    ours = harness.run(shut, 3)
    assert ours.loss_mask.any((1, 2)).all()
    assert not ours.in_vocab_loss_mask.any()
    assert ours.metrics["acc"] == [0.0, 0.0, 0.0]
    assert ours.total == 0.0
    assert all(np.all(gradient == 0) for gradient in ours.gradients.values())
    assert max(ours.metrics["alpha"]) < 1e-6
    # Without the component, some rows are inside and some outside: both kinds are aligned.
    mixed = harness.run(given, 3)
    assert 0 < mixed.sums["in_vocab_positions"][0] < mixed.sums["supervised_positions"][0]
    assert mixed.metrics["acc"][0] == pytest.approx(
        mixed.sums["correct_positions"][0] / mixed.sums["supervised_positions"][0]
    )
