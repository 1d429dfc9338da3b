"""What a model file promises: it resolves, its numbers follow from its fields, it fits its slice.

Nothing is counted by hand here: `target_config` becomes the target's own table of parameters, the
draft keys the head's, and every number in the opening comment is read off these.
"""

import math
import os
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from jax.sharding import AbstractMesh

from MaxDraft import pyconfig
from MaxDraft.drafts import registry as drafters
from MaxDraft.drafts.eagle3.dims import default_captured_layers
from MaxDraft.layers import params
from MaxDraft.run.spec import drafter_options
from MaxDraft.run.synthetic_step import target_dims
from MaxDraft.sharding import fill_parallelism
from MaxDraft.targets.model_file import dims_from_target_config, first_release
from MaxDraft.targets.registry import FAMILIES
from MaxDraft.targets.table import decoder_params

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "models"
MODELS = sorted(path.stem for path in FOLDER.glob("*.yml") if path.stem not in ("tiny", "default"))
DRAFT_KEYS = (
    "draft_intermediate_size",
    "draft_num_attention_heads",
    "draft_num_key_value_heads",
    "draft_head_dim",
)


@pytest.fixture(autouse=True)
def no_outside_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("M_")]:
        monkeypatch.delenv(name)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def config(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return pyconfig.initialize(
        [
            "train.py",
            str(ROOT / "configs" / "base.yml"),
            f"model_name={name}",
            f"target_path={tmp_path}",
            "grain_train_files=x",
        ]
    )


@pytest.fixture
def opening(name):
    return (FOLDER / f"{name}.yml").read_text().split("\n\n")[0]


@pytest.fixture
def dims(config):
    return target_dims(config)


@pytest.fixture
def target(dims):
    return decoder_params(dims, default_captured_layers(dims.num_layers), jnp.bfloat16)


@pytest.fixture
def drafter(config, dims):
    kind = drafters.drafter_class(config.drafter)
    return kind.from_options(drafter_options(config), dims)


@pytest.fixture
def head(drafter):
    return drafter.params_table()


def stated(pattern, text):
    found = re.search(pattern, text)
    assert found, f"the opening comment has nothing like {pattern}"
    return found.groups()


def kept_bytes(table, kind):
    """Bytes of a target in memory as its quantized files have it; the rest in its own dtype."""
    total = 0.0
    for path, param in params.flatten(table):
        count, leaf = math.prod(param.full_shape), path.split("/")[-1]
        experts = "/experts/" in path and "/shared/" not in path and leaf in ("gate", "up", "down")
        matrix = len(param.shape) > 1 and leaf not in ("embed", "head", "router", "shared_gate")
        if kind == "MXFP4" and experts:
            total += count * 4.25 / 8  # 32 numbers of 4 bits and one exponent of 8
        elif kind == "FP8" and matrix:
            *lead, rows, cols = param.full_shape
            scales = math.prod(lead) * math.ceil(rows / 128) * math.ceil(cols / 128)
            total += count + 4 * scales
        else:
            total += count * jnp.dtype(param.dtype).itemsize
    return total


def test_the_opening_names_command_and_known_acceptance(name, opening):
    assert f"python3 MaxDraft/train.py configs/base.yml model_name={name} " in opening
    assert "Acceptance to beat" in opening


def test_a_model_file_states_every_field_that_decides(config):
    """Without its family's defaults for absent fields, the dimensions are the same."""
    fields = {"max_position_embeddings": 1 << 30} | first_release(config.target_config)
    family = FAMILIES[fields["model_type"]]
    assert family.dims(fields) == dims_from_target_config(config.target_config)


def test_the_scalings_of_published_targets_are_stated():
    def ropes(name):
        fields = yaml.safe_load((FOLDER / f"{name}.yml").read_text())["target_config"]
        mixers = [layer.mixer for layer in dims_from_target_config(fields).layers]
        return [mixer.rope for mixer in mixers if mixer.rope]

    for name in ("gemma3-4b", "gemma3-12b", "gemma3-27b"):
        assert {rope.rope_type for rope in ropes(name)} == {"default", "linear"}
    assert ropes("llama4-scout")[0].rope_type == "llama3"
    assert ropes("kimi-k2")[0].factor == 32.0
    assert ropes("phi-4-mini")[0].attention_scaling == math.sqrt(1 + math.log(32) / math.log(4096))
    assert ropes("seed-oss-36b")[0].theta == 1e7
    assert ropes("qwen3-30b-a3b")[0].theta == ropes("qwen3-235b-a22b")[0].theta == 1e6


def test_the_shape_of_the_head_is_stated(name, config):
    keys = yaml.safe_load((FOLDER / f"{name}.yml").read_text())
    assert not [key for key in DRAFT_KEYS if not keys.get(key)]
    assert config.draft_num_attention_heads % config.draft_num_key_value_heads == 0
    assert config.draft_num_key_value_heads >= 2  # sglang-jax crashes on one


def test_the_memory_of_the_target_follows_from_its_fields(opening, target):
    count = params.count(target)
    pattern = r"target +([\d.]+)e9 parameters x 2 bytes \(bfloat16\) = ([\d.]+) GB"
    assert stated(pattern, opening) == (f"{count / 1e9:.3f}", f"{2 * count / 1e9:.1f}")


def test_the_memory_of_a_quantized_target_follows(config, opening, target):
    assert ("kept as in its files" in opening) == (config.target_quantization == "keep_quantized")
    if config.target_quantization == "keep_quantized":
        kind, size = stated(r"kept as in its files \(.*?(FP8|MXFP4).*?\) = ([\d.]+) GB", opening)
        assert size == f"{kept_bytes(target, kind) / 1e9:.1f}"


def test_the_memory_of_the_head_follows_from_its_shape(opening, head):
    def count(*names):
        return sum(params.count(head[name]) for name in names)

    total, ends = params.count(head), ("fc", "norm", "lm_head")
    pattern = r"fc ([\d.]+)e6 \+ layer ([\d.]+)e6 \+ norm, lm_head ([\d.]+)e6 = ([\d.]+)e6"
    parts = (count("fc"), total - count(*ends), count("norm", "lm_head"), total)
    assert stated(pattern, opening) == tuple(f"{part / 1e6:.1f}" for part in parts)
    pattern = r"x 12 bytes \(float32 master and two moments\) = ([\d.]+) GB"
    assert stated(pattern, opening) == (f"{12 * total / 1e9:.1f}",)


def test_the_memory_of_a_chip_leaves_half_for_a_step(opening, head):
    chips, room = map(int, stated(r"\((\d+) chips\s*(?:# )?of\s*(?:# )?(\d+) GB", opening))
    pattern = (
        r"\(([\d.]+) \+ ([\d.]+)\) / (\d+) = ([\d.]+) GB, and while .* ([\d.]+) GB for the whole"
    )
    target, state, ways, each, whole = stated(pattern, opening)
    sizes = re.findall(r" = ([\d.]+) GB\n", opening)  # of the target, kept if it is, and the head
    assert [target, state] == sizes[-2:] and int(ways) == chips
    assert abs((float(target) + float(state)) / chips - float(each)) <= 0.051
    # Every chip has the whole head, float32, and the gradient of its own rows.
    assert abs(float(whole) - 8 * params.count(head) / 1e9) <= 0.051
    assert float(each) <= 0.52 * room
    assert float(each) + float(whole) <= 0.85 * room


def test_the_rows_of_a_step_are_those_stated(name, config, opening):
    text = (FOLDER / f"{name}.yml").read_text()
    pattern = (
        r"A step is (\d+) rows of (\d+) tokens: (\d+) chips x per_device_batch_size (\d+) x "
        r"accumulation (\d+)"
    )
    rows, length, chips, batch, accumulation = map(int, stated(pattern, text))
    assert rows == chips * batch * accumulation
    assert (length, batch, accumulation) == (
        config.max_target_length,
        config.per_device_batch_size,
        config.gradient_accumulation_steps,
    )
    assert chips == int(stated(r"\((\d+) chips", opening)[0])


def test_every_parameter_can_be_split_over_the_slice(config, opening, target, head):
    sizes = [getattr(config, f"ici_{axis}_parallelism") for axis in config.mesh_axes]
    sizes = fill_parallelism(sizes, int(stated(r"\((\d+) chips", opening)[0]), "ici")
    mesh = AbstractMesh(sizes, tuple(config.mesh_axes))
    for table in (target, head):
        params.shardings(table, mesh, config.logical_axis_rules)


def test_every_model_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"model_name=([\w.-]+)", text)) - {"NAME"}
    assert named and named <= {*MODELS, "tiny"}
