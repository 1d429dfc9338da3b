"""Trains the tiny target: next-token prediction on the packed conversations, AdamW, cosine.

The model is the same decoder that runs every other target (targets/decoder.py), so what is trained
here is by construction what is read back later. One program is compiled, once: rows of one length,
several conversations to a row, told apart by their segment ids.

B rows, T tokens of a row, H hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.targets import decoder
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.table import decoder_params
from MaxDraft.tiny_target.recipe import Training
from MaxDraft.tiny_target.tokenizer import Encoded

Log = Callable[[str], None]
Batch = dict[str, np.ndarray]  # tokens, positions, segment_ids int32 and weights float32, [B, T]

PACKING_WINDOW = 64  # conversations looked through for one that fills a row
EMBEDDING_SCALE = 0.5  # standard deviation of an embedding's entries
HEAD_SCALE = 0.5  # first logits of unrelated tokens


def table_of(dims: DecoderDims) -> Tree:
    """Parameter table with all layers in one stack: nothing is captured here, so nothing is cut."""
    return decoder_params(dims, (dims.num_layers - 1,), jnp.float32)


def train(dims: DecoderDims, data: Sequence[Encoded], how: Training, log: Log) -> Tree:
    """-> float32 parameters laid out by `table_of`; one progress line every `log_every` steps."""
    params = _initialize(dims, how.seed)
    optimizer = _optimizer(how)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Tree, state, batch: Batch):
        loss, gradient = jax.value_and_grad(_loss)(params, dims, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    log(
        f"target: {parameters.count(table_of(dims)):,} parameters, {how.steps} steps of "
        f"{how.rows} x {how.length} tokens; compiling"
    )
    start, losses = time.monotonic(), []
    for number, batch in zip(range(1, how.steps + 1), _batches(data, how), strict=False):
        params, state, loss = step(params, state, batch)
        losses.append(loss)
        if number % how.log_every == 0 or number in (1, how.steps):
            mean = float(np.mean(jax.device_get(losses)))
            if not np.isfinite(mean):
                raise FloatingPointError(f"target: the loss at step {number} is {mean}")
            now, losses = time.monotonic(), []
            if number == 1:  # compiled: the clock of the estimate starts here
                compiled = now
                log(f"target: compiled in {now - start:.0f} s; loss {mean:.3f} before training")
                continue
            left = (now - compiled) / (number - 1) * (how.steps - number)
            log(
                f"target: step {number}/{how.steps}, loss {mean:.3f} nats per token (a prompt's "
                f"counts {how.prompt_weight:g}), about {left:.0f} s left"
            )
    return params


def _initialize(dims: DecoderDims, seed: int) -> Tree:
    """Initial parameters under which a short training learns to repeat what it has read.

    The residual stream starts as its token's embedding, and the LM head as the embedding's
    transpose: a copied embedding already points at its own token, also where the token is rare.
    """
    params = parameters.initialize(table_of(dims), seed)
    layers = dict(params["layers"][0][0])
    branch = (2 * dims.num_layers) ** -0.5  # two branches a layer add up along the stream
    layers["o"] = layers["o"] * branch
    layers["mlp"] = {**layers["mlp"], "down": layers["mlp"]["down"] * branch}
    unit = params["embed"] * dims.vocab_size**0.5  # entries of standard deviation 1
    return {
        **params,
        "embed": EMBEDDING_SCALE * unit,
        "layers": ((layers,),),
        "head": (HEAD_SCALE * dims.hidden_size**-0.5) * unit.T,
    }


def _optimizer(how: Training) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=how.learning_rate / (how.warmup_steps + 1),
        peak_value=how.learning_rate,
        warmup_steps=how.warmup_steps,
        decay_steps=max(how.steps, how.warmup_steps + 1),
        end_value=0.02 * how.learning_rate,
    )
    adamw = optax.adamw(
        schedule,
        b1=0.9,
        b2=0.95,
        weight_decay=how.weight_decay,
        mask=lambda tree: jax.tree.map(lambda w: w.ndim > 2, tree),  # the layers' matrices
    )
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def _loss(params: Tree, dims: DecoderDims, batch: Batch) -> jax.Array:
    """Mean cross-entropy of the next token, weighted: answers count, prompts count less."""
    segments = batch["segment_ids"]

    _, _, last = decoder.forward(
        params,
        batch["tokens"],
        batch["positions"],
        segments,
        dims,
        (dims.num_layers - 1,),
        jnp.float32,
        batch["tokens"].shape[1],
    )
    scores = decoder.logits(params, dims, last[:, :-1])  # [B, T - 1, V]
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["tokens"][:, 1:])
    weights = batch["weights"][:, 1:] * (segments[:, 1:] == segments[:, :-1])
    return (losses * weights).sum() / weights.sum()


def _batches(data: Sequence[Encoded], how: Training) -> Iterator[Batch]:
    """Endless batches; every epoch is shuffled anew, from the seed."""
    rows: list[Batch] = []
    for row in _rows(data, how):
        rows.append(row)
        if len(rows) == how.rows:
            yield {name: np.stack([row[name] for row in rows]) for name in row}
            rows = []


def _rows(data: Sequence[Encoded], how: Training) -> Iterator[Batch]:
    """Endless rows of whole conversations, filled from a window over the shuffled epochs."""
    if any(len(encoded.tokens) > how.length for encoded in data):
        raise ValueError(f"a conversation is longer than a row of {how.length} tokens")
    random = np.random.default_rng(how.seed)
    window: list[Encoded] = []
    while True:
        row, used, documents = _empty_row(how.length), 0, 0
        while True:
            if len(window) < PACKING_WINDOW:
                window += [data[index] for index in random.permutation(len(data))]
            near = enumerate(window[:PACKING_WINDOW])
            fits = (i for i, encoded in near if used + len(encoded.tokens) <= how.length)
            index = next(fits, None)
            if index is None:
                break
            encoded = window.pop(index)
            here = slice(used, used + len(encoded.tokens))
            used, documents = here.stop, documents + 1
            row["tokens"][here] = encoded.tokens
            row["positions"][here] = np.arange(len(encoded.tokens))
            row["segment_ids"][here] = documents
            row["weights"][here] = np.where(encoded.answered, 1.0, how.prompt_weight)
        yield row


def _empty_row(length: int) -> Batch:
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "positions", "segment_ids")}
    return row | {"weights": np.zeros(length, np.float32)}
