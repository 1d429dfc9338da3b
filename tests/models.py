"""Small random targets and heads for tests."""

import jax.numpy as jnp

from MaxDraft.drafts import eagle3
from MaxDraft.drafts.eagle3 import HeadDims
from MaxDraft.layers import params
from MaxDraft.layers.rope import Rope
from MaxDraft.targets import decoder
from MaxDraft.targets.decoder import DecoderDims

ROPE = Rope(theta=10000.0, head_dim=8)
CAPTURE = (1, 2, 4)


def tiny_dims(vocab_size: int = 12) -> DecoderDims:
    return DecoderDims(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-6,
        rope=ROPE,
        max_length=256,
    )


def tiny_head_dims(target: DecoderDims, draft_vocab_size: int) -> HeadDims:
    return HeadDims(
        hidden_size=target.hidden_size,
        intermediate_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        draft_vocab_size=draft_vocab_size,
        target_vocab_size=target.vocab_size,
        norm_eps=1e-6,
        rope=ROPE,
    )


def random_target(dims: DecoderDims, seed: int = 0):
    return params.initialize(decoder.decoder_params(dims, CAPTURE, jnp.float32), seed)


def random_head(dims: HeadDims, seed: int = 1):
    return params.initialize(eagle3.head_params(dims), seed)
