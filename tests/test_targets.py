"""The frozen target computes what transformers computes, and never guesses at config.json."""

import json

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import recipe

from MaxDraft.layers import rope as rotary
from MaxDraft.targets import decoder, hf_config, llama
from MaxDraft.targets.decoder import TargetError, check_capture, default_capture, layer_groups
from MaxDraft.targets.registry import dims_from_config

TOLERANCE = 1e-4
FAMILIES = sorted(recipe.CONFIGS)


def our_target(config):
    """logits [T, V] and features [T, 3, H] of the golden sequence, by the code under test."""
    dims = dims_from_config(config)
    if dims not in _outputs:
        # 300 does not divide 1024: the last block of queries is a part of one.
        _outputs[dims] = our_row(config, recipe.draw_tokens(config), block=300)
    return _outputs[dims]


_outputs = {}  # a target's dimensions say everything, as its weights follow from their names


def our_row(config, tokens, segments=None, positions=None, *, block):
    """logits [T, V] and features [T, 3, H] of one packed row."""
    length = len(tokens)
    dims = dims_from_config(config)
    capture = check_capture((), dims.num_layers)
    table = decoder.decoder_params(dims, capture, jnp.float32)
    params = harness.tree_of(table, drawn(config))
    row = [
        jnp.asarray(x, jnp.int32)[None]
        for x in (
            tokens,
            np.arange(length) if positions is None else positions,
            np.ones(length) if segments is None else segments,
        )
    ]

    def logits_and_features(params, tokens, positions, segments):
        _, features, last = decoder.features(
            params, tokens, positions, segments, dims, capture, jnp.float32, block
        )
        return decoder.logits(params, last)[0], features[0]

    logits, features = jax.jit(logits_and_features)(params, *row)
    return np.asarray(logits), np.asarray(features).reshape(length, 3, -1)


def drawn(config):
    """name -> array of the recipe; shapes are the checkpoint's, worked out from config.json."""
    H, I = config["hidden_size"], config["intermediate_size"]
    d = config.get("head_dim") or H // config["num_attention_heads"]
    q_size, kv_size = d * config["num_attention_heads"], d * config["num_key_value_heads"]
    shapes = {
        "embed_tokens": (config["vocab_size"], H),
        "lm_head": (config["vocab_size"], H),
        "q_proj": (q_size, H),
        "k_proj": (kv_size, H),
        "v_proj": (kv_size, H),
        "o_proj": (H, q_size),
        "gate_proj": (I, H),
        "up_proj": (I, H),
        "down_proj": (H, I),
        "q_norm": (d,),
        "k_norm": (d,),
    }

    def tensor(name):
        *_, module, kind = name.split(".")
        shape = shapes.get(module, (H,))
        return recipe.draw(name, shape[:1] if kind == "bias" else shape)

    return tensor


def errors_against(ours, logits, features):
    """Relative errors of the logits and of each of the three features."""
    return [
        harness.relative_error(ours[0], logits),
        *(harness.relative_error(ours[1][:, i], features[:, i]) for i in range(3)),
    ]


def golden(family):
    with np.load(recipe.FOLDER / f"{family}.npz") as file:
        return json.loads(str(file["config"])), file["logits"], file["features"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_features_equal_the_golden_file(family):
    config, logits, features = golden(family)
    ours = our_target(config)
    at = list(recipe.POSITIONS)
    errors = errors_against([x[at] for x in ours], logits, features)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_features_equal_a_live_transformers_model(family):
    pytest.importorskip("torch")
    from goldens import make_goldens

    config = recipe.CONFIGS[family]
    model = make_goldens.transformers_model(config)
    theirs = make_goldens.expected(model, config, recipe.draw_tokens(config))
    errors = errors_against(our_target(model.config.to_dict()), *theirs)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("family", ["llama_llama3", "llama_linear", "llama_yarn"])
def test_a_rope_scaling_that_is_ignored_changes_every_feature(family):
    config, logits, features = golden(family)
    theta = config["rope_parameters"]["rope_theta"]
    plain = config | {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    at = list(recipe.POSITIONS)
    errors = errors_against([x[at] for x in our_target(plain)], logits, features)
    assert min(errors) > 100 * TOLERANCE, errors


def test_a_document_has_the_same_features_alone_and_packed_behind_another():
    config, *_ = golden("llama_llama3")
    tokens = recipe.draw_tokens(config, 64)
    alone = our_row(config, tokens[24:], block=16)
    segments = np.repeat([1, 2], [24, 40])
    positions = np.concatenate([np.arange(24), np.arange(40)])
    packed = our_row(config, tokens, segments, positions, block=16)
    assert max(errors_against([x[24:] for x in packed], *alone)) < 1e-5


ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
    "yarn_betas": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "attention_factor": 0.7,
    },
    "yarn_mscales": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_angles_equal_a_live_transformers_rotary_embedding(name, head_dim):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = recipe.CONFIGS["llama"] | {
        "head_dim": head_dim,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"} | ROPES[name],
    }
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    )
    positions = np.arange(0, 2048, 31)
    cos, sin = theirs(torch.zeros(1, dtype=torch.float32), torch.tensor(positions)[None])
    ours = rotary.cos_sin(hf_config.rope(config), jnp.asarray(positions)[None])
    half = head_dim // 2
    np.testing.assert_allclose(ours[0], cos.numpy()[..., :half], atol=3e-4)
    np.testing.assert_allclose(ours[1], sin.numpy()[..., :half], atol=3e-4)


LLAMA = {key: value for key, value in recipe.CONFIGS["llama"].items() if key != "rope_parameters"}
LLAMA3 = {key: value for key, value in ROPES["llama3"].items() if key != "rope_type"}


def test_the_old_and_the_new_spelling_of_rope_mean_the_same():
    new = {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3}
    spellings = [
        {"rope_parameters": new},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
        | {"rope_parameters": new},
    ]
    ropes = [hf_config.rope(LLAMA | spelling) for spelling in spellings]
    assert ropes[0] == rotary.Rope(
        theta=500000.0,
        head_dim=16,
        kind="llama3",
        factor=32.0,
        original_length=256,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    assert all(rope == ropes[0] for rope in ropes)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ],
)
def test_rope_without_scaling_is_read_from_either_place(spelling):
    assert hf_config.rope(LLAMA | spelling) == rotary.Rope(theta=5e5, head_dim=16)


@pytest.mark.parametrize(
    ("spelling", "named"),
    [
        ({}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        (
            {
                "rope_theta": 1e4,
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
            },
            "rope_type",
        ),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "factor"),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "llama3"} | LLAMA3 | {"factor": None}},
            "factor",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "original_max_position_embeddings",
        ),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 1e4, "rope_scaling": {"factor": 8.0}}, "rope_type"),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear"} | ROPES["yarn"]},
            "contradicts",
        ),
    ],
)
def test_a_rope_that_is_missing_contradictory_or_unknown_is_an_error_that_names_it(spelling, named):
    with pytest.raises(TargetError, match=named):
        hf_config.rope(LLAMA | spelling)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("missing", ["absent", "null"])
def test_a_missing_field_is_an_error_that_names_it(name, missing):
    config = dict(recipe.CONFIGS["llama"])
    if missing == "absent":
        del config[name]
    else:
        config[name] = None
    with pytest.raises(TargetError, match=f"'{name}'"):
        dims_from_config(config)


def test_an_unknown_family_is_an_error_that_lists_the_known_ones():
    with pytest.raises(TargetError, match=r"'gpt2'.*llama.*qwen2.*qwen3"):
        dims_from_config(recipe.CONFIGS["llama"] | {"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("qwen2", {"use_sliding_window": True}, "sliding-window"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 8}, "sliding-window"),
        ("qwen3", {"head_dim": None}, "head_dim"),
    ],
)
def test_what_this_decoder_would_compute_wrongly_is_refused(family, change, named):
    with pytest.raises(TargetError, match=named):
        dims_from_config(recipe.CONFIGS[family] | change)


@pytest.mark.parametrize(
    ("family", "tied", "qkv_bias", "output_bias", "mlp_bias", "qk_norm", "head_dim"),
    [
        ("llama", False, False, False, False, False, 16),
        ("llama_tied", True, False, False, False, False, 16),
        ("llama_biases", False, True, True, True, False, 16),
        ("qwen2", False, True, False, False, False, 16),
        ("qwen2_tied", True, True, False, False, False, 16),
        ("qwen3", False, False, False, False, True, 24),
    ],
)
def test_the_switches_of_a_family(family, tied, qkv_bias, output_bias, mlp_bias, qk_norm, head_dim):
    dims = dims_from_config(golden(family)[0])
    assert dims.tied_head == tied
    assert dims.qkv_bias == qkv_bias
    assert dims.output_bias == output_bias
    assert dims.mlp_bias == mlp_bias
    assert dims.qk_norm == qk_norm
    assert dims.head_dim == head_dim
    assert dims.num_kv_heads == 2


def test_key_value_heads_default_to_the_query_heads():
    config = {
        key: value for key, value in recipe.CONFIGS["llama"].items() if key != "num_key_value_heads"
    }
    assert llama.dims(config).num_kv_heads == 4


def test_the_default_layers_are_those_of_eagle3():
    assert default_capture(32) == (1, 15, 28)
    assert default_capture(28) == (1, 13, 24)
    assert check_capture((), 32) == (1, 15, 28)
    assert check_capture([0, 2, 5], 6) == (0, 2, 5)


@pytest.mark.parametrize(
    ("capture", "layers", "named"),
    [
        ((), 4, "target_layer_ids"),  # [1, 1, 0]
        ((), 5, "target_layer_ids"),  # [1, 1, 1]
        ((), 6, "target_layer_ids"),  # [1, 2, 2]
        ((1, 1, 3), 8, "distinct"),
        ((3, 1, 5), 8, "ascending"),
        ((1, 3), 8, "three"),
        ((1, 2, 3, 4), 8, "three"),
        ((1, 3, 8), 8, "layer .*8.* does not exist"),
        ((-1, 3, 5), 8, "layer .*-1.* does not exist"),
    ],
)
def test_captured_layers_that_collide_or_do_not_exist_are_an_error(capture, layers, named):
    with pytest.raises(TargetError, match=named):
        check_capture(capture, layers)


@pytest.mark.parametrize(
    ("capture", "layers", "groups"),
    [
        ((1, 3, 6), 8, [range(0, 2), range(2, 4), range(4, 7), range(7, 8)]),
        ((0, 1, 2), 3, [range(0, 1), range(1, 2), range(2, 3)]),
        ((1, 2, 3), 7, [range(0, 2), range(2, 3), range(3, 4), range(4, 7)]),
    ],
)
def test_the_layers_are_cut_after_every_captured_one(capture, layers, groups):
    assert layer_groups(capture, layers) == groups


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_exactly_the_tensors_of_a_live_checkpoint(family):
    pytest.importorskip("torch")
    from goldens import make_goldens

    config = recipe.CONFIGS[family]
    dims = dims_from_config(config)
    names = []
    for param in jax.tree.leaves(decoder.decoder_params(dims, default_capture(dims.num_layers))):
        layers = [None] if param.layers is None else param.layers
        names += [param.tensor.format(layer=layer) for layer in layers]
    model = make_goldens.transformers_model(config)
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
