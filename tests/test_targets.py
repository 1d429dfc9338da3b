"""The frozen target computes what transformers computes, and never guesses at config.json."""

import functools
import json
import math

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import recipe, switches
from models import exact_power

from MaxDraft.convert.target.checkpoint import load_target, read_config, unused_tensors
from MaxDraft.drafts.eagle3.dims import check_captured_layers
from MaxDraft.layers import params
from MaxDraft.layers import rope as rotary
from MaxDraft.targets import decoder, hf_config
from MaxDraft.targets.dims import TargetError
from MaxDraft.targets.registry import dims_from_config
from MaxDraft.targets.table import decoder_params

TOLERANCE = 1e-4
NAMES = sorted(recipe.CONFIGS)
TOWERS = ("vision", "visual", "projector")  # of multimodal checkpoints: not read
# Every switch is dropped where its effect on the features differs from the others'.
DROPPED = {
    "deepseek_v2": ("latent bias", "expert groups"),
    "deepseek_v3": (
        "score scale",
        "rope scaling",
        "interleaved rope",
        "shared expert",
        "router scores",
        "selection bias",
        "expert groups",
    ),
    "gemma2": ("window", "score cap", "activation", "logit cap"),
    "gemma3_text": ("score scale", "layers' own rope", "1 + w norms", "embedding scale"),
    "glm4": ("interleaved rope", "sandwich norms"),
    "glm4_moe": ("partial rope", "q/k norm"),
    "gpt_oss": (
        "window",
        "sinks",
        "feed-forward bias",
        "activation",
        "router scores",
        "router bias",
    ),
    "kimi_k2": ("weight factor",),
    "llama4_maverick": ("temperature", "weighed input"),
    "llama4_scout": ("chunk", "q/k l2 norm", "layers' own rope"),
    "llama_biases": ("q/k/v bias", "o bias", "feed-forward bias"),
    "llama_linear": ("rope scaling",),
    "llama_llama3": ("rope scaling",),
    "llama_yarn": ("rope scaling", "rope attention scaling"),
    "minimax_m2": ("selection bias", "q/k norm"),
    "mistral_window": ("window",),
    "phi4_mini": ("rope scaling",),
    "qwen2_moe": ("shared gate",),
    "qwen3_moe": ("weights normed",),
    "qwen3_next": ("partial rope", "1 + w norms"),
}
# Without these the table names other tensors than the files hold: loading fails.
UNREADABLE = {"gated output", "tied head"}


def golden(name):
    """config, {tensor name: shape}, logits and features at recipe.POSITIONS."""
    with np.load(recipe.FOLDER / f"{name}.npz") as file:
        texts = [json.loads(str(file[key])) for key in ("config", "tensors")]
        return *texts, file["logits"], file["features"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name -> folder with the checkpoint's files, spelt as people have them."""

    @functools.cache
    def written(name):
        folder = tmp_path_factory.mktemp(name)
        return recipe.write_checkpoint(folder, recipe.CONFIGS[name], golden(name)[1])

    return written


def our_target(name, folder):
    """logits [T, V] and features [T, 3, H] of the golden sequence, by the code under test."""
    if name not in _outputs:
        dims = dims_from_config(read_config(folder))
        # 300 does not divide 1024: the last block of queries is a part of one.
        _outputs[name] = our_row(folder, dims, recipe.draw_tokens(name), block=300)
    return _outputs[name]


_outputs = {}


def our_row(folder, dims, tokens, segments=None, positions=None, *, block):
    """logits [T, V] and features [T, 3, H] of one packed row, the weights read from the files."""
    length = len(tokens)
    capture = check_captured_layers((), dims.num_layers)
    weights = load_target(folder, decoder_params(dims, capture, jnp.float32))
    row = [
        jnp.asarray(x, jnp.int32)[None]
        for x in (
            tokens,
            np.arange(length) if positions is None else positions,
            np.ones(length) if segments is None else segments,
        )
    ]
    logits, features = _run(weights, *row, dims=dims, capture=capture, block=block)
    return np.asarray(logits), np.asarray(features).reshape(length, 3, -1)


@functools.partial(jax.jit, static_argnames=("dims", "capture", "block"))
def _run(weights, tokens, positions, segments, *, dims, capture, block):
    _, features, last = decoder.forward(
        weights, tokens, positions, segments, dims, capture, jnp.float32, block
    )
    return decoder.logits(weights, dims, last)[0], features[0]


def errors_against(ours, logits, features):
    """Relative errors of the logits and of each of the three features."""
    return [
        harness.relative_error(ours[0], logits),
        *(harness.relative_error(ours[1][:, i], features[:, i]) for i in range(3)),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_features_equal_the_golden_file(name, checkpoint):
    *_, logits, features = golden(name)
    at = list(recipe.POSITIONS)
    ours = [x[at] for x in our_target(name, checkpoint(name))]
    errors = errors_against(ours, logits, features)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_features_equal_a_live_transformers_model(name, checkpoint):
    pytest.importorskip("torch")
    from goldens import make_goldens

    folder = checkpoint(name)
    model = make_goldens.transformers_model(name, folder)
    errors = errors_against(our_target(name, folder), *make_goldens.expected(name, model))
    assert max(errors) < TOLERANCE, errors


LONG = {  # heads of 128 and scalings of published checkpoints
    **recipe.CONFIGS["llama"],
    "head_dim": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 7,
    "max_position_embeddings": 8192,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaling",
    [
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_parity_with_transformers_holds_at_4096_tokens(scaling, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from goldens import make_goldens

    monkeypatch.setitem(recipe.CONFIGS, "long", LONG | {"rope_parameters": scaling})
    monkeypatch.setattr(recipe, "draw_tokens", functools.partial(recipe.draw_tokens, length=4096))
    shapes = make_goldens.tensor_shapes("long")
    folder = recipe.write_checkpoint(tmp_path, recipe.CONFIGS["long"], shapes)
    theirs = make_goldens.expected("long", make_goldens.transformers_model("long", folder))
    dims = dims_from_config(read_config(folder))
    ours = our_row(folder, dims, recipe.draw_tokens("long"), block=512)
    errors = errors_against(ours, *theirs)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_live_checkpoint_is_read_and_no_other(name, checkpoint):
    pytest.importorskip("torch")
    from goldens import make_goldens

    shapes = make_goldens.tensor_shapes(name)
    assert shapes == golden(name)[1]
    dims = dims_from_config(recipe.CONFIGS[name])
    table = decoder_params(dims, check_captured_layers((), dims.num_layers))
    text = [
        math.prod(shape)
        for tensor, shape in shapes.items()
        if not any(tower in tensor for tower in TOWERS)
    ]
    assert params.count(table) == sum(text)  # of fused tensors every part
    for line in unused_tensors(checkpoint(name), table):
        assert any(word in line for word in ("only the language model", *TOWERS)), line


@pytest.mark.parametrize("name", NAMES)
def test_a_config_as_transformers_writes_it_is_equal(name):
    assert dims_from_config(recipe.CONFIGS[name]) == dims_from_config(golden(name)[0])


@pytest.mark.parametrize(
    ("name", "switch"), [(name, switch) for name, which in DROPPED.items() for switch in which]
)
def test_a_switch_that_is_ignored_is_noticed(name, switch, checkpoint):
    *_, logits, features = golden(name)
    at = [position for position in recipe.POSITIONS if position < 256]
    without = switches.SWITCHES[switch](dims_from_config(recipe.CONFIGS[name]))
    ours = our_row(checkpoint(name), without, recipe.draw_tokens(name, 256), block=128)
    errors = errors_against([x[at] for x in ours], logits[: len(at)], features[: len(at)])
    assert max(errors) > 100 * TOLERANCE, errors


def test_every_switch_is_on_and_dropped_in_some_golden():
    on = {
        (name, switch)
        for name in NAMES
        for switch in switches.switched_on(dims_from_config(recipe.CONFIGS[name]))
    }
    dropped = {(name, switch) for name, which in DROPPED.items() for switch in which}
    assert dropped <= on
    assert {switch for _, switch in on} == set(switches.SWITCHES)
    assert {switch for _, switch in dropped} == set(switches.SWITCHES) - UNREADABLE


@pytest.mark.parametrize("name", ["llama_llama3", "gpt_oss", "llama4_scout", "qwen3_next"])
def test_a_packed_document_equals_the_document_alone(name, checkpoint):
    dims, tokens = dims_from_config(recipe.CONFIGS[name]), recipe.draw_tokens(name, 224)
    cut = 24
    segments = np.repeat([1, 2], [cut, len(tokens) - cut])
    positions = np.concatenate([np.arange(cut), np.arange(len(tokens) - cut)])
    # Alone: the other document stands behind, where nothing sees it.
    rolled = [np.roll(x, -cut) for x in (tokens, segments, positions)]
    alone = our_row(checkpoint(name), dims, *rolled, block=50)
    packed = our_row(checkpoint(name), dims, tokens, segments, positions, block=50)
    ours, theirs = [x[cut:] for x in packed], [x[:-cut] for x in alone]
    assert max(errors_against(ours, *theirs)) < TOLERANCE


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
    their_config = LlamaConfig(
        **{key: value for key, value in config.items() if key != "model_type"}
    )
    their_config.rope_parameters["rope_theta"] = exact_power(500000.0)
    theirs = LlamaRotaryEmbedding(their_config)
    positions = np.arange(0, 4097, 31)
    cos, sin = theirs(torch.zeros(1, dtype=torch.float32), torch.tensor(positions)[None])
    ours = rotary.cos_sin(hf_config.rope(config), jnp.asarray(positions)[None])
    # The angles are equal bit for bit: what differs is the rounding of cos, sin and their scaling.
    tolerance = 4 * 2**-24 * theirs.attention_scaling
    for our, their in zip(ours, (cos, sin), strict=True):
        their = their.numpy()[..., : head_dim // 2]
        np.testing.assert_allclose(our, their, rtol=0, atol=tolerance)


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
        rotary_dim=16,
        rope_type="llama3",
        factor=32.0,
        original_max_position_embeddings=256,
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
    assert hf_config.rope(LLAMA | spelling) == rotary.Rope(theta=5e5, rotary_dim=16)


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
        ({"rope_theta": 1e4, "rope_scaling": {"type": "longrope"}}, "short_factor"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk'"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic"}}, "factor"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "factor"),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "llama3"} | LLAMA3 | {"factor": None}},
            "factor",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "original_max_position_embeddings",
        ),
        ({"rope_theta": 1e4, "rope_scaling": {"factor": 8.0}}, "rope_type"),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear"} | ROPES["yarn"]},
            "contradicts",
        ),
    ],
)
def test_a_missing_or_contradictory_rope_is_named(spelling, named):
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
    with pytest.raises(TargetError, match=r"'gpt2'.*deepseek_v3.*llama.*qwen3"):
        dims_from_config(recipe.CONFIGS["llama"] | {"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 8}, "sliding_window"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 8}, "chunked_attention"),
        ("qwen3", {"layer_types": ["full_attention"] * 7}, "7 layers"),
        ("qwen3", {"head_dim": None}, "head_dim"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "noaux_tc"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
    ],
)
def test_what_this_decoder_would_compute_wrongly_is_refused(name, change, named):
    with pytest.raises(TargetError, match=named):
        dims_from_config(recipe.CONFIGS[name] | change)


def test_key_value_heads_default_to_the_query_heads():
    config = {
        key: value for key, value in recipe.CONFIGS["llama"].items() if key != "num_key_value_heads"
    }
    assert dims_from_config(config).layers[0].mixer.num_kv_heads == 4
