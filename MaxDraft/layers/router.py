"""How a token chooses its experts: logits, scores, groups, the best k, their weights.

DeepSeek-V2 (arXiv:2405.04434, section 2.1.2) scores by a softmax and limits a token to the experts
of its best groups; DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) scores by a sigmoid, with a bias
that takes part in the choice only.

L tokens, k experts of a token, E experts, H hidden size.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from MaxDraft.layers.params import Tree


@dataclasses.dataclass(frozen=True)
class Router:
    """How a token chooses `top_k` of the experts (num_experts_per_tok), and their weights.

    scores          "softmax" or "sigmoid" of the router's logits; "softmax_top": a softmax over the
                    chosen logits alone (gpt-oss)
    bias            the router's product has one (gpt-oss)
    selection_bias  `e_score_correction_bias`: added to the scores for choosing only, never to the
                    weights
    norm_topk_prob  weights are divided by their sum, to which norm_eps is added
    routed_scaling_factor
                    weights are multiplied by it
    n_group, topk_group
                    experts are chosen from the best `topk_group` of `n_group` groups
    group_score     of a group: "max", its best expert's score; "top2", the sum of its best two
    """

    top_k: int
    scores: str = "softmax"
    bias: bool = False
    selection_bias: bool = False
    norm_topk_prob: bool = False
    norm_eps: float = 0.0
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"


def route(x: jax.Array, w: Tree, router: Router) -> tuple[jax.Array, jax.Array]:
    """x [L, H] -> chosen experts int32 [L, k], their weights float32 [L, k].

    Equal scores are chosen in the order of jax.lax.top_k. Logits and scores are float32 whatever
    x's dtype: so the reference code of DeepSeek, GLM and MiniMax computes them. That of Mixtral,
    Qwen, gpt-oss and Llama 4 multiplies in x's dtype, which in bfloat16 only chooses less exactly.
    """
    logits = jnp.matmul(
        x.astype(jnp.float32), w["router"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if "router_bias" in w:
        logits = logits + w["router_bias"].astype(jnp.float32)
    scores, choice = logits, logits
    if router.scores == "softmax":
        scores = choice = jax.nn.softmax(logits)
    elif router.scores == "sigmoid":
        # The choice is made by the logits where nothing is added: the sigmoids of large logits are
        # all equal to 1 in float32.
        scores = jax.nn.sigmoid(logits)
    if "score_bias" in w:
        choice = scores + w["score_bias"]
    if router.n_group > 1:
        choice = _in_best_groups(choice, router)
    chosen = jax.lax.top_k(choice, router.top_k)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if router.scores == "softmax_top":
        weights = jax.nn.softmax(weights)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + router.norm_eps)
    return chosen, weights * router.routed_scaling_factor


def _in_best_groups(choice: jax.Array, router: Router) -> jax.Array:
    """Scores [L, E], with -inf outside of a token's best groups.

    DeepSeek-V2's code has 0 in place of -inf. The scores of a softmax are positive, so that either
    is below all of them.
    """
    groups = choice.reshape(len(choice), router.n_group, -1)  # [L, n_group, E / n_group]
    best = jax.lax.top_k(groups, 1 if router.group_score == "max" else 2)[0].sum(-1)
    kept = jax.lax.top_k(best, router.topk_group)[1]  # [L, topk_group]
    inside = (kept[:, :, None] == jnp.arange(router.n_group)).any(1)  # [L, n_group]
    return jnp.where(inside[:, :, None], groups, -jnp.inf).reshape(choice.shape)
