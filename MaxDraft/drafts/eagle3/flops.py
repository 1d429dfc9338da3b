"""Model FLOPs of training an EAGLE-3 head: 2 per multiply-add, forward and backward (3x)."""

from __future__ import annotations

from MaxDraft.drafts.eagle3.dims import NUM_CAPTURED, HeadDims


def draft_flops_per_token(
    dims: HeadDims, num_steps: int, length: float, supervised_share: float
) -> dict[str, float]:
    """FLOPs of each part of the head for one token of a document of `length` tokens.

    supervised_share: of the tokens, those that some step of the rollout supervises. fc and the
    step-0 keys and values are needed at every token, everything else at supervised positions only.
    Attention counts the causal half.
    """
    H = dims.hidden_size
    q_size, kv_size = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    keys_values = 2 * 2 * H * 2 * kv_size
    rest_of_layer = 2 * (2 * H * q_size + q_size * H + 3 * H * dims.intermediate_size)
    later_steps = supervised_share * (num_steps - 1)
    steps = supervised_share + later_steps
    return {
        # The target is frozen: no gradient flows into its hidden states, forward and weight only.
        "fc": 2 * 2 * NUM_CAPTURED * H * H,
        "draft layer": 3 * (steps * rest_of_layer + (1 + later_steps) * keys_values),
        "draft attention": 3 * steps * 2 * 2 * q_size * length / 2,
        "draft LM head": 3 * steps * 2 * H * dims.draft_vocab_size,
    }
