"""Frequencies, cosines and sines are those of transformers, also far into a sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import exact_power

from MaxDraft.layers.rope import Rope, cos_sin, frequencies

THETAS = (1e4, 1.5e5, 5e5, 1e6, 1e8)
DIMS = (16, 64, 80, 96, 128, 256)
SCALINGS = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama4": {  # no ramp
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
    "yarn_untruncated": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
}


def short_factor(dim):
    return tuple(1 + 0.037 * pair for pair in range(dim // 2))


def our_rope(scaling, theta, dim):
    fields = dict(SCALINGS[scaling])
    if scaling == "longrope":
        fields["short_factor"] = short_factor(dim)
    return Rope(theta, dim, **fields)


def their_config(scaling, theta, dim):
    """A LlamaConfig; theta: a number, or what stands in its place in the formula."""
    from transformers import LlamaConfig

    fields = {"rope_type": "default", "rope_theta": 1e4} | SCALINGS[scaling]
    if scaling == "longrope":
        factors = list(short_factor(dim))
        fields |= {"short_factor": factors, "long_factor": factors, "factor": 4.0}
    config = LlamaConfig(head_dim=dim, max_position_embeddings=131072, rope_parameters=fields)
    config.rope_parameters["rope_theta"] = theta
    return config


def their_frequencies(scaling, theta, dim):
    """inv_freq of transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = their_config(scaling, theta, dim)
    functions = ROPE_INIT_FUNCTIONS | {
        "default": LlamaRotaryEmbedding.compute_default_rope_parameters
    }
    return functions[config.rope_parameters["rope_type"]](config)[0].numpy()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_equal_transformers_bit_for_bit(scaling):
    pytest.importorskip("torch")
    for theta in THETAS:
        for dim in DIMS:
            theirs = their_frequencies(scaling, exact_power(theta), dim)
            np.testing.assert_array_equal(frequencies(our_rope(scaling, theta, dim)), theirs)


def test_frequencies_are_within_torchs_rounding_of_a_power():
    """torch promises its power to one unit in the last place; the reciprocal may double that."""
    pytest.importorskip("torch")
    for theta in THETAS:
        for dim in DIMS:
            ours = frequencies(our_rope("default", theta, dim))
            theirs = their_frequencies("default", theta, dim)
            units = np.abs(ours.view(np.int32) - theirs.view(np.int32))
            assert units.max() <= 2


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dim", [16, 128])
def test_cos_and_sin_equal_transformers_up_to_position_4096(scaling, dim):
    """The angles are equal, so cos and sin differ by the rounding of either library alone."""
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(their_config(scaling, exact_power(5e5), dim))
    positions = np.arange(0, 4097, 7)
    cos, sin = theirs(torch.zeros(1, dtype=torch.float32), torch.tensor(positions)[None])
    rope = dataclasses.replace(
        our_rope(scaling, 5e5, dim), attention_scaling=theirs.attention_scaling
    )
    ours = jax.jit(lambda p: cos_sin(rope, p))(jnp.asarray(positions)[None])
    tolerance = 4 * 2**-24 * theirs.attention_scaling
    for our, their in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(our, their.numpy()[..., : dim // 2], rtol=0, atol=tolerance)
