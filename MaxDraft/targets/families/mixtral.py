"""Mixtral: every layer a mixture, its weights the softmax of the chosen experts' scores.

MiniMax-M2: sigmoid scores with a bias for the choice only, norms over all query and all key heads.
"""

from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.params import TensorLayout
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Experts, Layer, Router, TargetError
from MaxDraft.targets.fields import field, listed, require, shown

MODEL_TYPES = ("mixtral", "minimax_m2")
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"mixtral": {"rope_theta": 1_000_000.0}, "minimax_m2": {"rope_theta": 5_000_000.0}}
_MOE = "block_sparse_moe."
NAMES = (
    ("experts/router", (TensorLayout(_MOE + "gate.weight", True),)),
    ("experts/score_bias", (TensorLayout(_MOE + "e_score_correction_bias"),)),
    ("experts/gate", (TensorLayout(_MOE + "experts.{expert}.w1.weight", True),)),
    ("experts/up", (TensorLayout(_MOE + "experts.{expert}.w3.weight", True),)),
    ("experts/down", (TensorLayout(_MOE + "experts.{expert}.w2.weight", True),)),
)


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    top_k = field(config, "num_experts_per_tok")
    if config["model_type"] == "minimax_m2":
        require(
            config,
            scoring_func="sigmoid",
            use_qk_norm=True,
            qk_norm_type="per_layer",
            shared_intermediate_size=0,
        )
        if any(kind != 1 for kind in listed(config, "attn_type_list") or ()):
            raise TargetError(
                f"config.json: attn_type_list {shown(config['attn_type_list'])} has another kind "
                f"of attention than 1, the full one"
            )
        head_dim = field(config, "head_dim")
        rotary_dim = field(config, "rotary_dim", absent=head_dim)
        rope = hf_config.rope(config, partial=rotary_dim / head_dim)
        if config.get("rotary_dim") and rope.rotary_dim != rotary_dim:
            raise TargetError(
                f"config.json contradicts itself: rotary_dim {rotary_dim}, and "
                f"partial_rotary_factor makes it {rope.rotary_dim}"
            )
        mixer = hf_config.attention(config, rope=rope, qk_norm="all_heads")
        router = Router(top_k, "sigmoid", selection_bias=True, norm_topk_prob=True)
    else:
        mixer = hf_config.attention(config, window=field(config, "sliding_window"))
        router = Router(top_k, norm_topk_prob=True)
    moe = Experts(
        num_experts=field(config, "num_local_experts"),
        intermediate_size=field(config, "intermediate_size"),
        router=router,
        activation=hf_config.activation(config),
    )
    layers = [Layer(mixer, moe)] * field(config, "num_hidden_layers")
    return hf_config.decoder(config, layers, names=NAMES)
