"""The embedded default's target: text, tokenizer, training and the folder that comes of it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from MaxDraft.drafts.eagle3.dims import check_captured_layers, default_captured_layers
from MaxDraft.layers import params as parameters
from MaxDraft.targets import registry
from MaxDraft.targets.table import decoder_params
from MaxDraft.tiny_target import build, corpus, tokenizer, train_target
from MaxDraft.tiny_target.build import ensure_tiny_target
from MaxDraft.tiny_target.recipe import Recipe, Training

SMALL = Recipe(
    hidden_size=32,
    intermediate_size=64,
    vocab_size=400,
    conversations=200,
    training=Training(steps=4, rows=2, length=192, log_every=2),
)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def entries():
    return corpus.read_entries(corpus.standard_library())


@pytest.fixture(scope="module")
def records(entries):
    return corpus.conversations(entries)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder in which a process was killed during the training, and what it left there."""
    folder = tmp_path_factory.mktemp("tiny")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, 'tests')\n"
        "from test_tiny_target import SMALL\n"
        "from MaxDraft.tiny_target.build import ensure_tiny_target\n"
        "def log(line):\n"
        "    if 'compiling' in line: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ensure_tiny_target(Path(sys.argv[1]), log, SMALL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=environment, cwd=ROOT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    return folder, [path.name for path in folder.iterdir()]


@pytest.fixture(scope="module")
def made(interrupted):
    """A small target, the folder it is kept in, and what was logged while it was made."""
    folder, _ = interrupted
    lines = []
    return ensure_tiny_target(folder, lines.append, SMALL), folder, lines


# ------------------------------------------------------------------------------------ the corpus
def test_the_text_is_the_same_in_every_process(records):
    script = (
        "import hashlib, json, sys\n"
        "from MaxDraft.tiny_target import corpus\n"
        "library = corpus.standard_library()\n"  # sysconfig loads its own data for this
        "before = set(sys.modules)\n"
        "records = corpus.conversations(corpus.read_entries(library))\n"
        "imported = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(hashlib.sha256(json.dumps(records).encode()).hexdigest(), sorted(imported))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    digest, imported = out.split(" ", 1)
    assert digest == hashlib.sha256(json.dumps(records).encode()).hexdigest()
    assert imported.strip() == "[]", "reading the library must not import it"


def test_thousands_of_conversations_and_none_is_asked_twice(records):
    asked = [
        [m["content"] for m in record["messages"] if m["role"] == "user"] for record in records
    ]
    assert len(records) > 2000
    assert len(set(map(tuple, asked))) == len(asked)
    assert sum(len(questions) > 1 for questions in asked) > len(records) / 10
    with_system = sum(record["messages"][0]["role"] == "system" for record in records)
    assert with_system > len(records) / 10


def test_roles_alternate_and_every_answer_has_text(records):
    for record in records:
        roles = [message["role"] for message in record["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        assert all(message["content"].strip() for message in record["messages"])


def test_signatures_are_what_the_source_says(entries):
    by_path = {entry.path: entry for entry in entries}
    insort = by_path["bisect.insort_right"]
    assert insort.signature == "insort_right(a, x, lo=0, hi=None, *, key=None)"
    assert [p.name for p in insort.parameters if p.required] == ["a", "x"]
    queue = by_path["queue.Queue"]
    assert ("qsize", "Return the approximate size of the queue (not reliable!).") in queue.members


@pytest.mark.parametrize("source", [None, "def dedent(text): return text\n"])
def test_a_python_without_documentation_is_told_what_to_do(source, tmp_path, monkeypatch):
    if source:
        (tmp_path / "textwrap.py").write_text(source)
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(corpus.CorpusError, match="target_path"):
        corpus.read_entries(corpus.standard_library())


# --------------------------------------------------------------------------------- the tokenizer
def test_any_text_survives_the_tokenizer(records):
    bpe = tokenizer.train((m["content"] for r in records[:500] for m in r["messages"]), 400)
    again = tokenizer.train((m["content"] for r in records[:500] for m in r["messages"]), 400)
    assert bpe.to_str() == again.to_str()
    for text in (
        "def f(a, *, b=None):\n\treturn a",
        "  naïve ☃ ",
        records[0]["messages"][-1]["content"],
    ):
        ids = bpe.encode(text).ids
        assert bpe.decode(ids) == text
        assert max(ids) < bpe.get_vocab_size() == 400


def test_the_chat_template_renders_the_tokens_of_training(made, records):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(made[0].target_path, local_files_only=True)
    bpe = tokenizer.tokenizers.Tokenizer.from_file(str(made[0].target_path / "tokenizer.json"))
    several = next(record for record in records if len(record["messages"]) == 5)
    for record in [several, *records[:20]]:
        ids = loaded.apply_chat_template(record["messages"], return_dict=True)["input_ids"]
        encoded = tokenizer.encode(bpe, record["messages"])
        assert ids == encoded.tokens
        answers = [t for t, answered in zip(ids, encoded.answered, strict=True) if answered]
        said = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
        assert loaded.decode(answers) == "".join(text + tokenizer.TURN_END for text in said)
        prompt = loaded.apply_chat_template(
            record["messages"][:-1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert encoded.answered[len(prompt)]
        assert not encoded.answered[len(prompt) - 1]


# ------------------------------------------------------------------------------------ the folder
def test_the_config_suits_every_engine(made):
    config = json.loads((made[0].target_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"] is None
    assert config["tie_word_embeddings"] is False
    assert config["num_key_value_heads"] >= 2
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    layers = config["num_hidden_layers"]
    assert check_captured_layers((), layers) == (1, layers // 2 - 1, layers - 4)


def test_the_weights_are_all_there_under_their_names(made):
    config = json.loads((made[0].target_path / "config.json").read_text())
    tensors = safetensors.numpy.load_file(made[0].target_path / "model.safetensors")
    dims = registry.dims_from_config(config)
    table = decoder_params(dims, default_captured_layers(dims.num_layers))
    expected = {
        param.tensor.format(layer=layer): param.shape[::-1] if param.transposed else param.shape
        for _, param in parameters.flatten(table)
        for layer in param.layers or (None,)
    }
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    norm = tensors["model.norm.weight"].astype(np.float32)
    assert np.isfinite(norm).all()


def test_transformers_loads_the_folder_without_a_network(made, monkeypatch):
    transformers = pytest.importorskip("transformers")
    folder = made[0].target_path
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert config.model_type == "llama"
    assert loaded.eos_token_id == config.eos_token_id == loaded.convert_tokens_to_ids("<|im_end|>")
    assert loaded.pad_token_id == config.pad_token_id
    assert loaded("dedent")["input_ids"] == loaded("dedent", add_special_tokens=False)["input_ids"]
    assert len(loaded) == config.vocab_size


def test_the_conversations_are_json_lines(made):
    lines = made[0].conversations_path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == SMALL.conversations
    assert all(list(json.loads(line)) == ["messages"] for line in lines)


def test_progress_tells_steps_loss_and_time(made):
    assert any("step 4/4" in line and "loss" in line and "left" in line for line in made[2])


# ------------------------------------------------------------------------------------- the cache
def test_a_second_call_does_nothing(made):
    before = {path: path.stat().st_mtime_ns for path in made[1].rglob("*")}
    lines = []
    assert ensure_tiny_target(made[1], lines.append, SMALL) == made[0]
    assert not lines
    assert {path: path.stat().st_mtime_ns for path in made[1].rglob("*")} == before


def test_another_recipe_makes_another_target():
    other = Recipe(training=Training(seed=1))
    assert build._key(Recipe()) == build._key(Recipe())
    assert build._key(other) != build._key(Recipe())


def test_a_kill_leaves_nothing_that_is_taken_for_a_target(interrupted, made):
    assert len(interrupted[1]) == 1
    assert interrupted[1][0].startswith(".")
    # The next call made the target, and removed what the killed process had left.
    assert [path.name for path in interrupted[0].iterdir()] == [made[0].target_path.parent.name]


def test_an_error_in_training_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(train_target, "train", fail)
    with pytest.raises(FloatingPointError):
        ensure_tiny_target(tmp_path, lambda line: None, SMALL)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(build.TinyTargetError, match="file"):
        ensure_tiny_target(tmp_path / "file" / "cache", lambda line: None, SMALL)


# ---------------------------------------------------------------------------------------- rows
def test_rows_hold_whole_conversations_with_their_own_positions():
    data = [
        tokenizer.Encoded(list(range(10, 10 + size)), [False, *[True] * (size - 1)])
        for size in (3, 5, 6, 7)
    ]
    batch = next(train_target._batches(data, Training(rows=3, length=12, seed=3)))
    for row in range(3):
        for document in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == document
            size = int(inside.sum())
            assert size in (3, 5, 6, 7)
            assert batch["tokens"][row][inside].tolist() == list(range(10, 10 + size))
            assert batch["positions"][row][inside].tolist() == list(range(size))
            assert (batch["weights"][row][inside][1:] == 1.0).all()
        assert (batch["weights"][row][batch["segment_ids"][row] == 0] == 0).all()
