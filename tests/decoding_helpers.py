"""Decoders on small random models for tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft.decoding.drafter import BoundDrafter
from MaxDraft.decoding.generate import generate
from MaxDraft.decoding.state import DecodeSpec
from MaxDraft.decoding.target_model import TargetModel
from MaxDraft.drafts.eagle3 import decoding as eagle3_decoding


def decode_spec(dims, captured_layers, head_dims, **settings):
    """A DecodeSpec of an EAGLE-3 head in float32: chains of 3, greedy, unless `settings` differ."""
    defaults = {"num_draft_tokens": 3, "max_new_tokens": 24, "stop_ids": (5,), "temperature": 0.0}
    return DecodeSpec(
        TargetModel(dims, captured_layers, jnp.float32),
        BoundDrafter(eagle3_decoding, head_dims),
        **defaults | settings,
    )


def decode(spec, params, prompts, lengths, seed=0):
    """generate(), compiled, with a random key for each prompt."""
    keys = jax.random.split(jax.random.key(seed), len(lengths))
    run = jax.jit(functools.partial(generate, spec))
    return jax.device_get(run(params, jnp.asarray(prompts), jnp.asarray(lengths), keys))


def assert_same_replies(a, b):
    np.testing.assert_array_equal(a.length, b.length)
    np.testing.assert_array_equal(a.tokens, b.tokens)
