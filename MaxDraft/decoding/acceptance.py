"""Which drafts stay: rules under which the reply is the target's own.

Greedy decoding keeps a draft while it is the target's argmax. Sampling keeps draft d with
probability min(1, p(d) / q(d)), where p is the target's distribution and q the one that d was drawn
from; at the first refusal the token is drawn from max(p - q, 0), normalized. The reply then follows
the target's distribution (Leviathan et al. 2023, Chen et al. 2023).

B batch, gamma drafts, V vocabulary. Every prompt has a random key of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def probabilities(logits: jax.Array, temperature: float) -> jax.Array:
    """The distribution that is sampled from: softmax(logits / temperature), float32 [..., V]."""
    return jax.nn.softmax(logits / temperature)


def choose_token(keys: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """keys [B], logits [B, V] -> tokens int32 [B]: the argmax at temperature 0, else a sample."""
    if temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    return _sample(keys, logits / temperature)


def accept_greedy(
    drafts: jax.Array,  # int32 [B, gamma]
    target_logits: jax.Array,  # float32 [B, gamma + 1, V]
) -> tuple[jax.Array, jax.Array]:
    """-> accepted drafts int32 [B], committed tokens int32 [B, gamma + 1].

    The first accepted + 1 tokens of a prompt count: the accepted drafts and the target's own token.
    """
    best = jnp.argmax(target_logits, -1).astype(jnp.int32)
    agreed = jnp.cumprod(drafts == best[:, :-1], axis=1)
    return agreed.sum(1).astype(jnp.int32), best


def accept_sampled(
    keys: jax.Array,  # [B]
    drafts: jax.Array,  # int32 [B, gamma], drawn from q
    q: jax.Array,  # float32 [B, gamma, V] the distributions that they were drawn from
    p: jax.Array,  # float32 [B, gamma + 1, V] the target's distributions
) -> tuple[jax.Array, jax.Array]:
    """Rejection sampling; returns the same two arrays as accept_greedy."""
    uniform_keys, residual_keys = split_keys(keys)
    p_draft = jnp.take_along_axis(p[:, :-1], drafts[..., None], -1)[..., 0]
    q_draft = jnp.take_along_axis(q, drafts[..., None], -1)[..., 0]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, drafts.shape[1:]))(uniform_keys)
    accepted = jnp.cumprod(uniform * q_draft < p_draft, axis=1).sum(1).astype(jnp.int32)
    # Past the last draft nothing was proposed: q = 0 there, and the residual is p itself.
    q = jnp.concatenate([q, jnp.zeros_like(p[:, :1])], axis=1)
    residual = jnp.take_along_axis(jnp.maximum(p - q, 0.0), accepted[:, None, None], 1)[:, 0]
    own = _sample(residual_keys, jnp.log(residual))
    places = jnp.arange(drafts.shape[1] + 1)
    tokens = jnp.concatenate([drafts, own[:, None]], axis=1)
    return accepted, jnp.where(places == accepted[:, None], own[:, None], tokens)


def split_keys(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """keys [B] -> two independent keys for each."""
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def fold_in(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """keys [B] -> the keys of draw `number`: one number for all prompts, or int [B]."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))


def _sample(keys: jax.Array, log_weights: jax.Array) -> jax.Array:
    """keys [B], unnormalized log probabilities [B, V] -> tokens int32 [B]."""
    return jax.vmap(jax.random.categorical)(keys, log_weights).astype(jnp.int32)
