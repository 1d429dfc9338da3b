"""Every family decodes with its cache as it reads packed documents, and drafts change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import assert_same_replies, decode, decode_spec
from goldens import recipe
from harness import relative_error

from MaxDraft.decoding.state import DecodeParams
from MaxDraft.decoding.target_model import CachedContext, TargetModel
from MaxDraft.drafts.eagle3.dims import HeadDims, check_captured_layers
from MaxDraft.drafts.eagle3.head import head_params
from MaxDraft.layers import params as parameters
from MaxDraft.targets import decoder
from MaxDraft.targets.draft_shape import draft_shape
from MaxDraft.targets.registry import dims_from_config
from MaxDraft.targets.table import decoder_params

# One of each kind of cache, mask and mixture; windows and chunks end within the text.
FAMILIES = (
    "deepseek_v3",
    "gemma3_text",
    "glm4_moe_lite",
    "gpt_oss",
    "llama4_scout",
    "mistral_window",
    "qwen3_5_text",
    "qwen3_next",
)
LENGTH = 130
DRAFT_VOCABULARY = 50


@functools.cache
def target(family):
    dims = dims_from_config(recipe.CONFIGS[family])
    capture = check_captured_layers((), dims.num_layers)
    params = parameters.initialize(decoder_params(dims, capture, jnp.float32), 0)
    return TargetModel(dims, capture, jnp.float32), params


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_read_in_pieces_gives_the_same_hidden_states(family):
    model, params = target(family)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.dims.vocab_size, (2, LENGTH)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    _, aux_hidden_states, last = jax.jit(
        lambda p: decoder.forward(
            p, tokens, positions, positions * 0, model.dims, model.captured_layers, jnp.float32, 64
        )
    )(params)

    cache = model.empty_cache(2, LENGTH)

    @jax.jit
    def extend(params, cache, tokens, positions):
        return model.extend(params, cache, tokens, CachedContext.from_chain(positions, LENGTH))

    # The first piece ends with two tokens that are refused: they are fed again, as others.
    wrong = tokens[:, :122].at[:, 120:].add(1) % model.dims.vocab_size
    found = [extend(params, cache, wrong, positions[:, :122])]
    for at in range(120, LENGTH, 5):
        piece = slice(at, at + 5)
        found.append(extend(params, found[-1][2], tokens[:, piece], positions[:, piece]))
    for whole, number in ((aux_hidden_states, 0), (last, 1)):
        pieces = [found[0][number][:, :120], *(part[number] for part in found[1:])]
        assert relative_error(jnp.concatenate(pieces, 1), whole) < 1e-4


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4_scout", "mistral_window"])
def test_branches_of_a_tree_are_read_as_if_alone(family):
    # After 120 tokens: r, then either b, or a and c. All four in one pass, b between r and a, so
    # that the slots of a and c are not their positions.
    model, params = target(family)
    tokens = np.random.default_rng(3).integers(0, model.dims.vocab_size, 124).astype(np.int32)
    r, b, a, c = range(120, 124)
    slots = 130
    parents = {
        r: list(range(120)),
        b: [*range(120), r],
        a: [*range(120), r],
        c: [*range(120), r, a],
    }
    visible = np.zeros((1, 4, slots), bool)
    for row, (token, seen) in enumerate(parents.items()):
        visible[0, row, [*seen, token]] = True
    positions = np.array([[120, 121, 121, 122]])
    slot_positions = np.arange(slots)[None]
    slot_positions[0, 120:124] = positions

    @jax.jit
    def read(cache, tokens, context):
        return model.extend(params, cache, tokens, context)

    def chain(cache, ids):
        start = 0 if len(ids) > 4 else 120
        rows = jnp.arange(start, start + len(ids))[None]
        return read(cache, tokens[None, ids], CachedContext.from_chain(rows, slots))

    _, _, cache = chain(model.empty_cache(1, slots), list(range(120)))
    context = CachedContext(np.array([[r, b, a, c]]), positions, visible, slot_positions)
    aux_hidden_states, last, _ = read(cache, tokens[None, 120:], context)
    for branch in ([r, b], [r, a, c]):
        expected_aux, expected_last, _ = chain(cache, branch)
        rows = np.array(branch) - 120
        assert relative_error(aux_hidden_states[:, rows], expected_aux) < 1e-4
        assert relative_error(last[:, rows], expected_last) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_replies_are_the_same_with_drafts_and_without(family):
    model, params = target(family)
    shape = draft_shape(model.dims)
    head_dims = HeadDims(
        model.dims.hidden_size,
        shape.intermediate_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        DRAFT_VOCABULARY,
        model.dims.vocab_size,
        model.dims.norm_eps,
        shape.rope,
    )
    head = parameters.initialize(head_params(head_dims), 1)
    rng = np.random.default_rng(2)  # no token of any reply is nearly tied with another
    prompts = jnp.asarray(rng.integers(0, model.dims.vocab_size, (2, 20)), jnp.int32)
    lengths = jnp.asarray([20, 13])
    spec = decode_spec(model.dims, model.captured_layers, head_dims, stop_ids=(0,))
    params = DecodeParams(params, head, jnp.arange(DRAFT_VOCABULARY))
    plain = decode(spec.without_drafts(), params, prompts, lengths)
    assert_same_replies(plain, decode(spec, params, prompts, lengths))
