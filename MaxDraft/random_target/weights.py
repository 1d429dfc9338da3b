"""The weights of a small random target, named and laid out as its family's checkpoints are.

The tensors follow from the family's own parameter table: every parameter is drawn and written where
the loader looks first, so no tensor name stands here.

Every layer is random. The embedding is too, and the LM head knows, seen through it, which token
follows which in the conversations:

    head[v] ~ sum over t of P(v | t) embed[t]

so that the target's replies look like text, differ from prompt to prompt, and can be learnt. Where
the head is the embedding, the last norm's signs keep it from repeating the token it has just read.

E experts, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from MaxDraft.convert.tensor_layout import per_expert, stored_shape, tensor_name
from MaxDraft.drafts.registry import drafter_class
from MaxDraft.layers.params import Param, flatten
from MaxDraft.random_target.configs import VOCAB_SIZE
from MaxDraft.targets import registry
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.table import decoder_params
from MaxDraft.tiny_target import corpus, tokenizer

NUM_CONVERSATIONS = 400
LENGTH = 128  # tokens of the longest conversation
HEAD_SCALE = 2.5  # length of a row of the LM head: how far apart logits are
TIED_SCALE = 5.0  # of the last norm, where the embedding is the head: the same


@functools.cache
def texts() -> tuple[list[corpus.Record], Any, np.ndarray]:
    """Conversations, their tokenizer, and how often token v follows t in an answer: [t, v]."""
    records = corpus.conversations(corpus.read_entries(corpus.standard_library()))
    bpe = tokenizer.train(
        (message["content"] for record in records for message in record["messages"]), VOCAB_SIZE
    )
    chosen, follows = [], np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    for record in records:
        encoded = tokenizer.encode(bpe, record["messages"])
        tokens, answered = np.array(encoded.tokens), np.array(encoded.answered)
        if len(tokens) <= LENGTH and len(chosen) < NUM_CONVERSATIONS:
            chosen.append(record)
            np.add.at(follows, (tokens[:-1], tokens[1:]), answered[1:])
    return chosen, bpe, follows


def draw_tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and bfloat16 arrays of the unquantized file."""
    dims = registry.dims_from_config(config)
    captured_layers = drafter_class("eagle3").captured_layers((), dims.num_layers)
    table = decoder_params(dims, captured_layers, jnp.bfloat16)
    drawn = {path: draw(path, param, dims) for path, param in flatten(table)}
    counts = texts()[2].sum(0)[:, None]
    common = (counts / counts.max()) ** 0.05  # [V, 1]: rare tokens are rarely chosen
    if dims.tied_head:
        drawn["embed"] *= common
    else:
        drawn["head"] = (common * head_rows(drawn["embed"])).T
    tensors: dict[str, np.ndarray] = {}
    for path, param in flatten(table):
        for name, piece in pieces(param, drawn[path]):
            array = tensors.setdefault(name, np.zeros(stored_shape(param), param.dtype))
            place(array, param, piece)
    yield from tensors.items()


def pieces(param: Param, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A parameter cut into what each tensor holds of it."""
    layout = param.layouts[0]
    for row, layer in enumerate([None] if param.layers is None else param.layers):
        layer_values = values if layer is None else values[row]
        if per_expert(layout):
            for expert, expert_values in enumerate(layer_values):
                yield tensor_name(layout, layer, expert), expert_values
        else:
            yield tensor_name(layout, layer), layer_values


def place(array: np.ndarray, param: Param, piece: np.ndarray) -> None:
    """Writes what a tensor holds of a parameter into it: the inverse of reading."""
    layout = param.layouts[0]
    oriented = array.swapaxes(-1, -2) if layout.transposed and array.ndim > 1 else array
    if layout.part:
        stop = layout.part.start + piece.shape[-1] * layout.part.step
        oriented = oriented[..., layout.part.start : stop : layout.part.step]
    oriented[...] = piece.astype(array.dtype)


def draw(path: str, param: Param, dims: DecoderDims) -> np.ndarray:
    """Random float32 values, by the parameter's path."""
    x = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(param.full_shape)
    name = path.split("/")[-1]
    branch = dims.num_layers**-0.5  # of its two branches a layer adds half as much as it reads
    if name == "embed":
        x /= dims.embed_scale
    elif path == "norm" and dims.tied_head:
        x = TIED_SCALE * np.sign(x) - dims.norm_offset
    elif name.endswith("norm"):
        sandwich = branch if name.endswith("post_norm") else 1.0
        x = sandwich * (1 + 0.1 * x) - dims.norm_offset
    elif name.endswith("bias"):
        x *= 0.1
    elif len(param.shape) > 1:
        x *= (branch if name in ("o", "down") else 1.0) / np.sqrt(param.shape[-2])
    return x.astype(np.float32)


def head_rows(embed: np.ndarray) -> np.ndarray:
    """[V, H]: of every token the mean embedding of those it follows, all of one length."""
    _, _, follows = texts()
    likely = follows / np.maximum(follows.sum(1, keepdims=True), 1)
    sums = likely.T @ embed
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return HEAD_SCALE * sums / np.maximum(lengths, 1e-9)  # 0 where it follows none
