"""Drafting and acceptance against the NumPy twin, with the positions of either kind of engine."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import decode, decode_spec
from models import CAPTURE, random_head, random_target, tiny_dims, tiny_head_dims
from safetensors.numpy import save_file

from MaxDraft.decoding.state import DecodeParams
from MaxDraft.drafts.eagle3 import decoding as eagle3_decoding
from MaxDraft.drafts.eagle3.head import head_params
from MaxDraft.drafts.eagle3.numpy_twin import NumpyTwin
from MaxDraft.layers.params import flatten
from MaxDraft.targets import decoder

TARGET = tiny_dims()
HEAD = tiny_head_dims(TARGET, draft_vocab_size=7)
DRAFT_TO_TARGET = np.array([0, 1, 3, 4, 7, 9, 11], np.int32)
LENGTH = 48  # of padded texts, longer than any


@pytest.fixture(scope="module")
def pair():
    return random_target(TARGET), random_head(HEAD)


@pytest.fixture(scope="module")
def twin(pair, tmp_path_factory):
    """The random head as an engine would load it, in float32."""
    folder = tmp_path_factory.mktemp("head")
    weights = zip(flatten(head_params(HEAD)), jax.tree.leaves(pair[1]), strict=True)
    tensors = {
        param.tensor: np.ascontiguousarray(x.T if param.transposed else x)
        for (_, param), x in weights
    }
    tensors["d2t"] = DRAFT_TO_TARGET.astype(np.int64) - np.arange(len(DRAFT_TO_TARGET))
    save_file(tensors, folder / "model.safetensors")
    config = {
        "rms_norm_eps": HEAD.norm_eps,
        "head_dim": HEAD.head_dim,
        "num_attention_heads": HEAD.num_heads,
        "num_key_value_heads": HEAD.num_kv_heads,
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return NumpyTwin(folder)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("slots", ["in order", "anywhere"])
def test_a_chain_has_the_logits_of_the_numpy_twin(pair, twin, slots, offset):
    rng = np.random.default_rng(0)
    rows, steps, num_slots = 9, 4, 20
    embeddings = rng.normal(size=(rows + steps, HEAD.hidden_size)).astype(np.float32)
    aux_hidden_states = rng.normal(size=(rows, 3 * HEAD.hidden_size)).astype(np.float32)
    places = np.arange(rows) if slots == "in order" else rng.permutation(rows)
    visible = np.zeros((rows, num_slots), bool)
    for row in range(rows):
        visible[row, places[: row + 1]] = True
    positions = np.arange(100, 100 + rows)
    logits = []

    def choose(step, scores):  # the tokens are numbered as their embeddings
        logits.append(scores[0])
        return jnp.array([rows + 1 + step]), None

    @jax.jit
    def chain(params):
        cache = eagle3_decoding.empty_cache(HEAD, 1, num_slots, jnp.float32)
        states, cache = eagle3_decoding.absorb(
            params,
            HEAD,
            cache,
            jnp.asarray(embeddings[None, 1 : rows + 1]),
            jnp.asarray(aux_hidden_states[None]),
            jnp.asarray(places[None]),
            jnp.asarray(positions[None]),
            jnp.asarray(visible[None]),
        )
        eagle3_decoding.draft(
            params,
            HEAD,
            cache,
            embed=lambda tokens: jnp.asarray(embeddings)[tokens],
            state=states[:, -1],
            token=jnp.array([rows]),
            slots=jnp.array([rows]),
            positions=jnp.array([100 + rows]),
            visible=jnp.asarray(visible[-1:]),
            choose=choose,
            num_draft_tokens=steps,
            recurrent_position_offset=offset,
        )
        return jnp.stack(logits)

    ours = np.asarray(chain(pair[1]))
    expected = twin.logits(embeddings, aux_hidden_states, positions, steps, offset)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    other = twin.logits(embeddings, aux_hidden_states, positions, steps, 1 - offset)
    np.testing.assert_array_equal(other[0], expected[0])  # the first draft reads no draft
    assert (abs(other[1:] - expected[1:]).max(-1) > 1e-2).all()


@jax.jit
def target_pass(params, tokens):
    """int [1, T] -> embeddings [T, H], aux hidden states [T, 3H], argmax [T] of the target."""
    positions, segments = jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), jnp.int32)
    embeddings, aux_hidden_states, last = decoder.forward(
        params, tokens, positions, segments, TARGET, CAPTURE, jnp.float32, LENGTH
    )
    return (
        embeddings[0],
        aux_hidden_states[0],
        jnp.argmax(decoder.logits(params, TARGET, last)[0], -1),
    )


@pytest.mark.parametrize("offset", [0, 1])
def test_acceptance_is_that_of_either_kind_of_engine(pair, twin, offset):
    # The whole decoding again, in whole-sequence passes, with chains drafted by the twin. These
    # prompts are ones for which the two offsets accept different drafts.
    steps, new_tokens = 4, 24
    prompts = np.random.default_rng(3).integers(0, TARGET.vocab_size, (3, 11)).astype(np.int32)
    spec = decode_spec(
        TARGET,
        CAPTURE,
        HEAD,
        num_draft_tokens=steps,
        max_new_tokens=new_tokens,
        stop_ids=(99,),
        recurrent_position_offset=offset,
    )
    reply = decode(spec, DecodeParams(*pair, jnp.asarray(DRAFT_TO_TARGET)), prompts, np.full(3, 11))

    def read(text):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(text)] = text
        return map(np.asarray, target_pass(pair[0], padded))

    for row, prompt in enumerate(prompts):
        text = prompt.tolist()
        text.append(int(list(read(text))[2][len(text) - 1]))
        accepted = np.zeros(steps, int)
        while len(text) < 11 + new_tokens:
            chain = []
            for step in range(steps):
                embeddings, aux_hidden_states, _ = read(text + chain)
                rows = len(text) - 1
                logits = twin.logits(
                    embeddings[: rows + step + 1],
                    aux_hidden_states[:rows],
                    np.arange(rows),
                    step + 1,
                    offset,
                )
                chain.append(int(twin.target_ids()[logits[step].argmax()]))
            _, _, best = read(text + chain)
            best = best[len(text) - 1 : len(text) + steps].tolist()
            kept = next((i for i in range(steps) if chain[i] != best[i]), steps)
            accepted[:kept] += 1
            text = (text + best[: kept + 1])[: 11 + new_tokens]
        assert reply.tokens[row].tolist() == text[11:]
        assert reply.accepted_drafts[row].tolist() == accepted.tolist()
