"""The gated delta rule in chunks equals the paper's recurrence, token by token, in float64."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from MaxDraft.layers.delta_net import (
    causal_conv,
    gated_delta_rule,
    gated_delta_step,
    gated_norm,
)

TOLERANCE = 1e-5
N, DK, DV = 3, 8, 5
# Lengths of the documents of a row; what is left of the longest row is padding, segment 0.
LENGTHS = (
    (1, 1, 30, 2, 1, 64, 1, 40, 5),  # several in a chunk, and across the borders of chunks
    (64, 64, 16),  # at the borders of chunks
    (150,),
    (3, 100, 20),
)
SEGMENTS = np.zeros((len(LENGTHS), 150), np.int32)
for row, lengths in zip(SEGMENTS, LENGTHS, strict=True):
    row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
DECAYS = {
    "none": lambda rng, shape: np.zeros(shape),
    "weak": lambda rng, shape: -1e-3 * rng.uniform(size=shape),
    "any": lambda rng, shape: -(10 ** rng.uniform(-4, np.log10(20), shape)),
    "strong": lambda rng, shape: np.full(shape, -20.0),
    # What is forgotten in one chunk is far more than what the other tokens decay by.
    "bursts": lambda rng, shape: np.where(rng.uniform(size=shape) < 0.3, -20.0, -1e-2),
}

rule = jax.jit(gated_delta_rule, static_argnums=6)
step = jax.jit(gated_delta_step)


def draw(decays="any", seed=0, shape=SEGMENTS.shape):
    """q, k, v, log_decay, beta in float32, as the projections could give them."""
    rng = np.random.default_rng(seed)
    sizes = [(*shape, N, DK), (*shape, N, DK), (*shape, N, DV)]
    q, k, v = (2 * rng.normal(size=size) for size in sizes)
    log_decay, beta = DECAYS[decays](rng, (*shape, N)), rng.uniform(size=(*shape, N))
    return [np.asarray(x, np.float32) for x in (q, k, v, log_decay, beta)]


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def recurrence(q, k, v, log_decay, beta, segments):
    """S_t = S_{t-1} (alpha (I - beta k k^T)) + beta v k^T, o_t = S_t q (equation 10), float64."""
    q, k, v, log_decay, beta = (np.asarray(x, np.float64) for x in (q, k, v, log_decay, beta))
    q, k = unit(q) / np.sqrt(q.shape[-1]), unit(k)
    out = np.zeros_like(v)
    for b, n in np.ndindex(v.shape[0], v.shape[2]):
        for t in range(v.shape[1]):
            if t == 0 or segments[b, t] != segments[b, t - 1]:
                S = np.zeros((v.shape[-1], k.shape[-1]))
            k_t, b_t = k[b, t, n], beta[b, t, n]
            S = S @ (np.exp(log_decay[b, t, n]) * (np.eye(len(k_t)) - b_t * np.outer(k_t, k_t)))
            S = S + b_t * np.outer(v[b, t, n], k_t)
            out[b, t, n] = S @ q[b, t, n]
    return out


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("chunk", [64, 7, 1000])
def test_chunks_equal_the_recurrence(decays, chunk):
    arrays = draw(decays)
    ours = rule(*arrays, SEGMENTS, chunk)
    assert harness.relative_error(ours, recurrence(*arrays, SEGMENTS)) < TOLERANCE


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_any_length_is_computed(length):
    arrays = draw(shape=(1, length))
    segments = np.ones((1, length), np.int32)
    ours = rule(*arrays, segments, 64)
    assert harness.relative_error(ours, recurrence(*arrays, segments)) < TOLERANCE


def test_a_key_that_is_overwritten_at_every_token_stays_exact():
    # All keys one, fully written, nothing forgotten: powers of this system overflow float32, and
    # only the newest value may be read.
    q, k, v, log_decay, beta = draw("none")
    q = k = np.broadcast_to(k[:, :1], k.shape)
    arrays = [q, k, v, log_decay, np.ones_like(beta)]
    ours = rule(*arrays, SEGMENTS, 64)
    assert harness.relative_error(ours, v / np.sqrt(DK)) < TOLERANCE


def test_a_long_memory_stays_exact():
    arrays = draw("weak", shape=(1, 1500))
    segments = np.ones((1, 1500), np.int32)
    ours = rule(*arrays, segments, 64)
    assert harness.relative_error(ours, recurrence(*arrays, segments)) < TOLERANCE


@pytest.mark.parametrize("decays", ["none", "any"])
def test_a_packed_document_equals_the_document_alone(decays):
    arrays = draw(decays)
    packed = rule(*arrays, SEGMENTS, 64)
    for start, stop in ((2, 32), (35, 99), (99, 100), (100, 140)):  # of the first row
        alone = [x[:1, start:stop] for x in arrays]
        expected = rule(*alone, np.ones((1, stop - start), np.int32), 64)
        assert harness.relative_error(packed[:1, start:stop], expected) < TOLERANCE


def test_documents_and_padding_do_not_change_one_another():
    own = SEGMENTS[0] == 6  # across two chunks, others in both
    first, second = draw(seed=0), draw(seed=1)
    mixed = [
        np.where(own[:, None, None] if x.ndim == 4 else own[:, None], x[:1], 1e3 * y[:1])
        for x, y in zip(first, second, strict=True)
    ]
    one, two = (rule(*[x[:1] for x in arrays], SEGMENTS[:1], 64) for arrays in (first, mixed))
    np.testing.assert_array_equal(one[:, own], two[:, own])


@pytest.mark.parametrize("decays", DECAYS)
def test_steps_equal_chunks(decays):
    arrays = [x[2:3] for x in draw(decays)]  # one document
    chunks = rule(*arrays, SEGMENTS[2:3], 64)
    state, outs = jnp.zeros((1, N, DK, DV)), []
    for t in range(SEGMENTS.shape[1]):
        out, state = step(state, *(x[:, t] for x in arrays))
        outs.append(out)
    assert harness.relative_error(np.stack(outs, 1), chunks) < TOLERANCE


def test_half_precision_inputs_lose_nothing_inside():
    arrays = draw("weak")
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    half[3] = jnp.asarray(arrays[3])
    wide = [np.asarray(x, np.float32) for x in half]
    ours = rule(*half, SEGMENTS, 64)
    assert ours.dtype == jnp.bfloat16
    # The same numbers in, so only the result is rounded.
    np.testing.assert_array_equal(ours, rule(*wide, SEGMENTS, 64).astype(jnp.bfloat16))

    state = jnp.asarray(np.random.default_rng(0).normal(size=(4, N, DK, DV)), jnp.float32)
    out, new = step(state, *(x[:, 0] for x in half))
    assert (out.dtype, new.dtype) == (jnp.bfloat16, jnp.float32)
    expected, same = step(state, *(x[:, 0] for x in wide))
    np.testing.assert_array_equal(out, expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(new, same)


def equations(jaxpr):
    """Every equation of a traced program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def traced(length):
    """Equations of the rule over two rows, chunks of 16."""
    shapes = [(2, length, N, DK)] * 2 + [(2, length, N, DV)] + [(2, length, N)] * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    program = jax.make_jaxpr(functools.partial(gated_delta_rule, chunk=16))(*arrays, ids)
    return list(equations(program.jaxpr))


def test_memory_grows_with_length_in_one_loop_over_chunks():
    def largest(program):
        return max(out.aval.size for equation in program for out in equation.outvars)

    short, long = traced(1024), traced(4096)
    loops = [e for e in long if e.primitive.name in ("scan", "while")]
    assert [e.params["length"] for e in loops] == [4096 // 16]
    assert largest(long) == 4 * largest(short) < 4096**2


def test_products_stay_in_float32_on_any_accelerator():
    with jax.default_matmul_precision("bfloat16"):
        products = [e for e in traced(64) if e.primitive.name == "dot_general"]
    highest = jax.lax.Precision.HIGHEST
    assert products
    assert all(e.params["precision"] == (highest, highest) for e in products)


def conv_loop(x, weight, segments):
    """Token by token in float64, then SiLU."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    out = np.zeros_like(x)
    for b, t in np.ndindex(segments.shape):
        for w, row in enumerate(weight):
            at = t - (len(weight) - 1) + w
            if at >= 0 and segments[b, at] == segments[b, t]:
                out[b, t] += row * x[b, at]
    return out / (1 + np.exp(-out))


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_the_convolution_sees_its_own_document_only(taps):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*SEGMENTS.shape, 6)).astype(np.float32)
    weight = rng.normal(size=(taps, 6)).astype(np.float32)
    ours = jax.jit(causal_conv)(x, weight, SEGMENTS)
    assert harness.relative_error(ours, conv_loop(x, weight, SEGMENTS)) < TOLERANCE


def test_rows_shorter_than_the_convolution_are_computed():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(1, 2, 6)), rng.normal(size=(4, 6))
    segments = np.ones((1, 2), np.int32)
    ours = causal_conv(jnp.float32(x), jnp.float32(weight), segments)
    assert harness.relative_error(ours, conv_loop(x, weight, segments)) < TOLERANCE


def test_the_norm_is_weighed_and_then_gated():
    rng = np.random.default_rng(0)
    x, gate, weight = (rng.normal(size=shape) for shape in ((2, 7, N, DV), (2, 7, N, DV), DV))
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * weight
    expected *= gate / (1 + np.exp(-gate))
    ours = gated_norm(*(jnp.float32(y) for y in (x, gate, weight)), 1e-3)
    assert harness.relative_error(ours, expected) < TOLERANCE


# -- against transformers, live


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
    return pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")


def run_torch(function, *arrays, dtype="float32", **options):
    """NumPy arrays in, NumPy arrays out, under no_grad and in dtype."""
    import torch

    with torch.no_grad():
        tensors = [torch.tensor(np.asarray(x), dtype=getattr(torch, dtype)) for x in arrays]
        out = function(*tensors, **options)
    first, *rest = out if isinstance(out, tuple) else (out,)
    return [x.float().numpy() for x in (first, *rest)]


@pytest.mark.parametrize("decays", DECAYS)
def test_documents_equal_transformers(theirs, decays):
    arrays = draw(decays)
    ours = rule(*arrays, SEGMENTS, 64)
    for b, i in ((0, 6), (1, 1), (2, 1), (3, 2)):
        own = SEGMENTS[b] == i
        out, _ = run_torch(
            theirs.torch_chunk_gated_delta_rule,
            *(x[b, own][None] for x in arrays),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        # Theirs, not ours, rounds decays at the size of the sum over a chunk: 2e-5 after bursts.
        assert harness.relative_error(ours[b, own], out[0]) < 1e-4


def test_a_step_equals_transformers(theirs):
    arrays = [x[:, :1] for x in draw()]
    state = np.random.default_rng(0).normal(size=(4, N, DK, DV)).astype(np.float32)
    import torch

    out, new = run_torch(
        theirs.torch_recurrent_gated_delta_rule,
        *arrays,
        initial_state=torch.tensor(state),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    ours = step(state, *(x[:, 0] for x in arrays))
    assert harness.relative_error(ours[0], out[:, 0]) < TOLERANCE
    assert harness.relative_error(ours[1], new) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_convolution_rounds_where_transformers_does(theirs, dtype):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 40, 6), (2, 6)))
    ours = causal_conv(x, weight, jnp.ones((2, 40), jnp.int32))
    assert ours.dtype == dtype
    x, weight = (np.asarray(y, np.float32) for y in (x, weight))
    [out] = run_torch(
        theirs.causal_conv1d_fn, x.swapaxes(1, 2), weight.T, dtype=dtype, activation="silu"
    )
    out = out.swapaxes(1, 2)
    if dtype == "bfloat16":  # a sum of two exact products is one number in any order
        np.testing.assert_array_equal(np.asarray(ours, np.float32), out)
    assert harness.relative_error(ours, out) < TOLERANCE


# The last place of a bfloat16 is at most 2^-7 of the number.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", TOLERANCE), ("bfloat16", 2**-7)])
def test_the_norm_equals_transformers(theirs, dtype, tolerance):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 40, 6), (2, 40, 6), 6)]
    ours = gated_norm(*arrays, 1e-6)
    assert ours.dtype == dtype
    norm = theirs.Qwen3NextRMSNormGated(6)

    def weighed(x, gate, weight):
        norm.weight.data = weight
        return norm(x, gate)

    [out] = run_torch(weighed, *(np.asarray(y, np.float32) for y in arrays), dtype=dtype)
    np.testing.assert_allclose(np.asarray(ours, np.float32), out, rtol=tolerance, atol=0)
