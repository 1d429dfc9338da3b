"""Whatever stands in a config.json, reading it ends in dimensions or in one of our own errors."""

import json
import time

import numpy as np
import pytest
from goldens import recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxDraft.layers.rope import frequencies
from MaxDraft.targets.dims import DecoderDims, TargetError
from MaxDraft.targets.draft_shape import draft_shape
from MaxDraft.targets.fields import FIELDS
from MaxDraft.targets.plan import layer_groups
from MaxDraft.targets.registry import dims_from_config
from MaxDraft.targets.stop_tokens import stop_token_ids

DETERMINISTIC = settings(derandomize=True, deadline=None, max_examples=400)


def golden_config(name):
    with np.load(recipe.FOLDER / f"{name}.npz") as file:
        return json.loads(str(file["config"]))


CONFIGS = {name: golden_config(name) for name in recipe.CONFIGS}
NESTED = ("text_config", "rope_parameters", "rope_scaling", "full_attention", "sliding_attention")
OTHER_FIELDS = (
    "model_type",
    "hidden_act",
    "hidden_activation",
    "layer_types",
    "mlp_layer_types",
    "mlp_only_layers",
    "moe_layers",
    "no_rope_layers",
    "attn_type_list",
    "topk_method",
    "scoring_func",
    "rope_type",
    "type",
    "short_factor",
    "long_factor",
    "eos_token_id",
    *NESTED,
)
NAMES = sorted({*FIELDS, *OTHER_FIELDS})
# Numbers of the kinds that json.loads gives, the extremes included.
numbers = st.one_of(
    st.integers(-3, 70),
    st.integers(),
    st.sampled_from([0, 10**9, 2**31, 2**63, 10**400, -(10**400)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([1e-320, 1e-30, 0.5, 1.0, 1e4, 1e30, 1e300]),
)
TEXTS = "x silu full_attention sliding_attention yarn llama3 longrope linear dynamic su 1"
texts = st.sampled_from(["", *TEXTS.split()])
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=9),
        st.dictionaries(st.one_of(st.sampled_from(NAMES), texts), inner, max_size=5),
    ),
    max_leaves=12,
)


def replace_at(config, path, name, value):
    """A copy of the config whose object at `path`, where there is one, has another value."""
    if path and isinstance(config.get(path[0]), dict):
        inner = replace_at(config[path[0]], path[1:], name, value)
        return config | {path[0]: inner}
    return config | {name: value}


@st.composite
def mutated_configs(draw):
    """A published-like config with one to three fields changed, on any level of nesting."""
    config = CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.lists(st.sampled_from(NESTED), max_size=2, unique=True))
        config = replace_at(config, path, draw(st.sampled_from(NAMES)), draw(values))
    return config


def read(config):
    """The dimensions, or None where our own error says what is wrong; in bounded time."""
    start = time.perf_counter()
    try:
        dims = dims_from_config(config)
    except TargetError as error:
        assert len(str(error)) < 2000
        dims = None
    assert time.perf_counter() - start < 5  # hundreds of times what the slowest takes
    return dims


@DETERMINISTIC
@given(mutated_configs())
def test_a_mutated_config_is_read_or_is_our_own_error(config):
    dims = read(config)
    if dims is not None:
        assert isinstance(dims, DecoderDims) and 1 <= dims.num_layers <= 1000
        assert dims.norm_eps > 0 and dims.max_length >= 1 and hash(dims)
        for rope in {getattr(layer.mixer, "rope", None) for layer in dims.layers} - {None}:
            assert np.isfinite(frequencies(rope)).all()


@DETERMINISTIC
@given(st.one_of(values, st.dictionaries(st.sampled_from(NAMES), values, max_size=20)))
def test_any_json_value_is_read_or_is_our_own_error(config):
    read(config)


@DETERMINISTIC
@given(st.one_of(values, st.fixed_dictionaries({"eos_token_id": values})))
def test_stop_tokens_of_any_file_are_ids_or_our_own_error(file):
    for arguments in ((file, None), ({}, file)):
        try:
            ids = stop_token_ids(*arguments)
        except TargetError as error:
            assert len(str(error)) < 2000
        else:
            assert list(ids) == sorted(set(ids)) and all(type(token) is int for token in ids)


@settings(DETERMINISTIC, max_examples=60)
@given(mutated_configs())
def test_a_head_fits_every_target_that_is_read_or_our_own_error(config):
    dims = read(config)
    if dims is not None:
        try:
            shape = draft_shape(dims)
        except TargetError:
            return
        assert shape.num_heads % shape.num_kv_heads == 0
        assert np.isfinite(frequencies(shape.rope)).all()


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "gemma3_text"])
def test_the_deepest_stack_that_is_read_is_cut_in_bounded_time(name):
    config = {key: value for key, value in CONFIGS[name].items() if key != "layer_types"}
    dims = dims_from_config(config | {"num_hidden_layers": 1000})
    start = time.perf_counter()
    groups = layer_groups(dims.layers, (1, 499, 996))
    assert time.perf_counter() - start < 30
    assert groups[-1].end == 1000
