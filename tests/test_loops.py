"""A loop of counted_loop computes as fori_loop does, and its name says what it goes over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxDraft.cost import compiled_flops, traced_flops
from MaxDraft.layers.loops import counted_loop, expected_trips_of, trip_count_scope

X = jnp.full((3, 3), 0.5)
PRODUCT = 2 * 3**3


def powers(x, n, trips):
    return counted_loop("powers", 0, n, lambda _, y: y @ x, x, trips)


def test_a_counted_loop_computes_as_fori_loop_does():
    expected = jax.lax.fori_loop(0, 4, lambda _, y: y @ X, X)
    np.testing.assert_array_equal(jax.jit(powers, static_argnums=2)(X, 4, 2.5), expected)


def test_a_compiled_program_names_what_a_loop_goes_over():
    text = jax.jit(lambda x, n: powers(x, n, 2.5)).lower(X, 4).compile().as_text()
    [loop] = [line for line in text.splitlines() if " while(" in line]
    assert "/powers/" in loop
    assert "times" not in loop


@pytest.mark.parametrize("trips", [1, 2.5, 3.75, 1e7, 1 / 64])
def test_the_trips_that_a_loop_states_are_those_counted(trips):
    def nested(x, n):  # the outer loop's tag is not the inner one's
        # Without the factor, jax's cache of compiled programs, which leaves names out of its keys,
        # would give the program of other trips.
        return counted_loop("outer", 0, n, lambda i, y: powers(trips * y, n, trips), x, 4)

    inner = round(trips * PRODUCT)
    assert traced_flops.count(nested, X, 5, platform="cpu") == 4 * inner
    compiled = jax.jit(nested).lower(X, 5).compile().as_text()
    assert compiled_flops.count(compiled) == pytest.approx(4 * trips * PRODUCT)


def test_a_loop_in_a_gradient_keeps_its_trips():
    def loss(x, n):
        @jax.custom_vjp
        def run(x):
            return powers(x, n, 3)

        run.defvjp(lambda x: (run(x), x), lambda x, g: (powers(g, n, 5),))
        return run(x).sum()

    count = traced_flops.count(jax.grad(loss), X, 4, platform="cpu")
    assert count == (3 + 5) * PRODUCT


def test_scopes_without_a_tag_state_no_trips():
    assert expected_trips_of("rollout_blocks/while") is None
    assert expected_trips_of("jit(step)/expected_trips_3/body") is None


@pytest.mark.parametrize("count", [traced_flops.count, None])
def test_an_untagged_loop_inside_a_tagged_one_is_an_error(count):
    def function(x, n):
        with trip_count_scope("outer", 2.5):
            return jax.lax.fori_loop(
                0, n, lambda i, x: jax.lax.fori_loop(0, i, lambda _, y: y @ y, x), x
            )

    with pytest.raises(ValueError, match="counted_loop"):
        if count:
            count(function, X, 4, platform="cpu")
        else:
            compiled_flops.count(jax.jit(function).lower(X, 4).compile().as_text())
