"""Model FLOPs of a training step, counted by hand: 2 per multiply-add, what the method needs.

Forward only for the target, forward and backward (3x) for what is trained. Recomputation in the
backward pass is the implementation's choice and is not counted. Attention counts the causal half.
"""

from __future__ import annotations

from MaxDraft.drafts.eagle3 import HeadDims
from MaxDraft.targets.decoder import DecoderDims


def per_token(
    target: DecoderDims, head: HeadDims, ttt_length: int, length: int
) -> dict[str, float]:
    """FLOPs of each part for one token of a packed row of `length` tokens."""
    H = target.hidden_size
    q, kv = target.num_heads * target.head_dim, target.num_kv_heads * target.head_dim
    target_layer = 2 * (H * (q + 2 * kv) + q * H + 3 * H * target.intermediate_size)
    draft_q, draft_kv = head.num_heads * head.head_dim, head.num_kv_heads * head.head_dim
    draft_layer = 2 * (
        2 * H * (draft_q + 2 * draft_kv) + draft_q * H + 3 * H * head.intermediate_size
    )
    return {
        "target layers": target.num_layers * target_layer,
        "target attention": target.num_layers * 2 * 2 * q * length / 2,
        "target LM head": 2 * H * target.vocab_size,
        "fc": 2 * 2 * 3 * H * H,  # the features are frozen: no gradient flows into them
        "draft layer": 3 * ttt_length * draft_layer,
        "draft attention": 3 * ttt_length * 2 * 2 * draft_q * length / 2,
        "draft LM head": 3 * ttt_length * 2 * H * head.draft_vocab_size,
    }
