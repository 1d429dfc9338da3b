"""Makes the tiny target once and keeps it: corpus, tokenizer, training, Hugging Face files.

    <folder>/<key>/conversations.jsonl    every conversation, for the head's training and evaluation
    <folder>/<key>/target/                what transformers, MaxDraft and the engines load

The key is a checksum of the recipe, of this package's source and of the Python that carries the
text, so a change of any of them makes a new target. Everything is written into a hidden folder that
is renamed when it is complete: what has its name is whole.

The weights are stored in bfloat16, as served models are: engines pick their precision from the
file, so the head learns from exactly the weights that will be served.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from MaxDraft import storage
from MaxDraft.errors import UserError
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.targets import registry
from MaxDraft.tiny_target import corpus, tokenizer, train_target
from MaxDraft.tiny_target.recipe import Recipe, hf_config

Log = Callable[[str], None]


class TinyTargetError(UserError):
    """The tiny target cannot be made or kept here."""


@dataclasses.dataclass(frozen=True)
class TinyTarget:
    """Where the finished files lie."""

    target_path: Path
    conversations_path: Path


def ensure_tiny_target(folder: Path, log: Log, recipe: Recipe | None = None) -> TinyTarget:
    """The tiny target kept in `folder`; made there first, in a minute or two, where it is missing.

    `log` receives one line at a time. CorpusError where this Python carries no documented source,
    TinyTargetError where `folder` cannot be written.
    """
    recipe = recipe or Recipe()
    folder = Path(folder).expanduser().absolute()
    finished = folder / _key(recipe)
    made = TinyTarget(finished / "target", finished / "conversations.jsonl")
    if finished.is_dir():
        return made
    try:
        storage.remove_abandoned(folder)
        with storage.fresh_folder(finished) as fresh:
            _make(fresh, recipe, log)
            storage.flush_folder(fresh)
            _publish(fresh, finished)
    except OSError as error:
        raise TinyTargetError(f"the tiny target cannot be written to {folder}: {error}") from error
    log(f"tiny target: finished, kept in {finished}")
    return made


def _make(folder: Path, recipe: Recipe, log: Log) -> None:
    start = time.monotonic()
    log("tiny target: reading the documentation in Python's standard library")
    entries = corpus.read_entries(corpus.standard_library())
    records = corpus.conversations(entries)
    bpe = tokenizer.train(
        (message["content"] for record in records for message in record["messages"]),
        recipe.vocab_size,
    )
    encoded = [tokenizer.encode(bpe, record["messages"]) for record in records]
    kept = [i for i, e in enumerate(encoded) if len(e.tokens) <= recipe.training.length]
    kept = kept[: recipe.conversations] if recipe.conversations >= 0 else kept
    records, encoded = [records[i] for i in kept], [encoded[i] for i in kept]
    log(
        f"tiny target: {len(records):,} conversations about {len(entries):,} functions, classes "
        f"and modules, {sum(len(e.tokens) for e in encoded):,} tokens, "
        f"{sum(sum(e.answered) for e in encoded):,} of them in answers; "
        f"tokenizer of {bpe.get_vocab_size():,} tokens; {time.monotonic() - start:.0f} s"
    )
    with (folder / "conversations.jsonl").open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")

    config = hf_config(recipe, bpe.get_vocab_size())
    dims = registry.dims_from_config(config)
    params = train_target.train(dims, encoded, recipe.training, log)

    target = folder / "target"
    target.mkdir()
    tokenizer.write_json(target / "config.json", config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokenizer.write_json(
        target / "generation_config.json",
        {name: config[name] for name in names} | {"do_sample": False},
    )
    tokenizer.save(bpe, target, recipe.max_position_embeddings)
    safetensors.numpy.save_file(
        dict(_tensors(train_target.table_of(dims), params)),
        target / "model.safetensors",
        metadata={"format": "pt"},
    )


def _tensors(table: Tree, params: Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint names and bfloat16 tensors, layers unstacked, matrices [out, in]."""
    leaves = jax.tree.leaves(params)
    for (_, param), leaf in zip(parameters.flatten(table), leaves, strict=True):
        array = np.asarray(leaf.astype(jnp.bfloat16))
        for index, layer in enumerate((None,) if param.layers is None else param.layers):
            one = array if layer is None else array[index]
            one = one.T if param.transposed else one
            yield param.tensor.format(layer=layer), np.ascontiguousarray(one)


def _key(recipe: Recipe) -> str:
    digest = hashlib.sha256(f"{recipe}\n{sys.version}\n".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"tiny-{digest.hexdigest()[:12]}"


def _publish(fresh: Path, finished: Path) -> None:
    try:
        fresh.rename(finished)
    except OSError:
        if not finished.is_dir():  # else another process was faster, with the same content
            raise
