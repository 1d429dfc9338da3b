"""DeepSeek V2, V3, R1 and Kimi K2: latent attention, shared experts, group-limited routing.

V2 scores experts by a softmax; V3 by a sigmoid, with a bias that takes part in the choice only.
"""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Experts, Layer, Router, TargetError
from MaxDraft.targets.fields import default, field, require, shown

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
# What absent fields mean in this family (targets/fields.py has what they mean in all). transformers
# has no class of Kimi K2: its files must have every field.
DEFAULTS = {"deepseek_v2": {"rope_theta": 10_000.0}, "deepseek_v3": {"rope_theta": 10_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    if field(config, "moe_layer_freq") != 1:
        raise TargetError("config.json: moe_layer_freq other than 1 is not supported")
    if config["model_type"] == "deepseek_v2":
        require(config, scoring_func="softmax", rope_interleave=True, mlp_bias=False)
        router = _softmax(config)
    else:
        router = sigmoid_router(config)
    mixer, dense = hf_config.mla(config), field(config, "first_k_dense_replace")
    moe, mlp = experts(config, router), hf_config.mlp(config)
    layers = [
        Layer(mixer, mlp if i < dense else moe) for i in range(field(config, "num_hidden_layers"))
    ]
    return hf_config.decoder(config, layers)


def experts(config: Mapping[str, Any], router: Router) -> Experts:
    """Routed experts, and the `n_shared_experts` as one MLP that every token passes through."""
    size = field(config, "moe_intermediate_size")
    return Experts(
        num_experts=field(config, "n_routed_experts"),
        intermediate_size=size,
        router=router,
        activation=hf_config.activation(config),
        shared_intermediate_size=size * field(config, "n_shared_experts"),
    )


def sigmoid_router(config: Mapping[str, Any]) -> Router:
    """DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), which GLM-4.5 has too."""
    require(config, scoring_func="sigmoid", topk_method="noaux_tc")
    return Router(
        top_k=field(config, "num_experts_per_tok"),
        scores="sigmoid",
        selection_bias=True,
        norm_topk_prob=field(config, "norm_topk_prob"),
        norm_eps=1e-20,
        routed_scaling_factor=field(config, "routed_scaling_factor"),
        n_group=field(config, "n_group"),
        topk_group=field(config, "topk_group"),
        group_score="top2",
    )


def _softmax(config: Mapping[str, Any]) -> Router:
    method = config.get("topk_method") or default("topk_method")
    if method not in ("greedy", "group_limited_greedy") or config.get("norm_topk_prob"):
        raise TargetError(
            f"config.json: routing with topk_method {shown(method)} and norm_topk_prob "
            f"{shown(config.get('norm_topk_prob'))} is not known for deepseek_v2"
        )
    limited = method == "group_limited_greedy"
    return Router(
        top_k=field(config, "num_experts_per_tok"),
        routed_scaling_factor=field(config, "routed_scaling_factor"),
        n_group=field(config, "n_group") if limited else 1,
        topk_group=field(config, "topk_group") if limited else 1,
    )
