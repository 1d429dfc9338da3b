"""The benchmark's counts are right, and it runs where nothing but jax is installed."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from MaxDraft import benchmark, config_checks, pyconfig
from MaxDraft.cost import compiled_flops
from MaxDraft.cost.topologies import TopologyError
from MaxDraft.input_pipeline.synthetic import conversations
from MaxDraft.layers.loops import counted_loop
from MaxDraft.pyconfig import ConfigError
from MaxDraft.run import spec as run_spec
from MaxDraft.run.synthetic_step import open_synthetic_step, target_dims

ROOT = Path(__file__).resolve().parent.parent
BASE = str(ROOT / "configs" / "base.yml")
TARGET = (
    "target_config={model_type: qwen3, hidden_size: 64, intermediate_size: 96, "
    "rms_norm_eps: 1.0e-6, "
    "num_hidden_layers: 8, num_attention_heads: 8, num_key_value_heads: 4, head_dim: 8, "
    "vocab_size: 128, tie_word_embeddings: false, rope_theta: 1.0e6}"
)
SMALL = [
    BASE,
    TARGET,
    "dtype=float32",
    "weight_dtype=float32",
    "max_target_length=32",
    "draft_vocab_size=64",
    "ttt_length=3",
    "per_device_batch_size=1",
    "attention_block_size=32",
    "rollout_block_size=16",
]
needs_eight = pytest.mark.skipif(len(jax.devices()) != 8, reason="needs eight devices")


def compiled(function, *args):
    return compiled_flops.count(jax.jit(function).lower(*args).compile().as_text())


def test_compiled_products_count_as_often_as_they_run():
    x = jnp.ones((16, 16))
    one = 2 * 16**3
    assert compiled(lambda x: jnp.sin(x @ x), x) == one
    assert (
        compiled(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=7)[0], x) == 7 * one
    )

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ x) @ (x + x.T), lambda: x @ x)

    assert compiled(branches, x) == 2 * one

    def counted(x, n):
        return counted_loop("products", 0, n, lambda _, y: y @ x, x, 3)

    assert compiled(counted, x, 5) == 3 * one
    with pytest.raises(ValueError, match="loop"):
        compiled(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: y @ x, x), x, 5)


@needs_eight
def test_what_every_device_repeats_counts_for_each():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    x = jax.device_put(jnp.ones((16, 16)), NamedSharding(mesh, P("x")))
    w = jax.device_put(jnp.ones((16, 16)), NamedSharding(mesh, P()))
    one = 2 * 16**3
    assert 8 * compiled(lambda x, w: x @ w, x, w) == one
    assert 8 * compiled(lambda x, w: w @ w, x, w) == 8 * one


def counted(*changes, tokens="all"):
    """The benchmark's counts for SMALL with other keys, without running it."""
    keys = {key.split("=")[0]: key for key in [*SMALL[1:], *changes]}
    config = pyconfig.initialize(["benchmark.py", BASE, *keys.values()], reads_files=False)
    _, result = benchmark.compile_and_count(open_synthetic_step("x", config, tokens))
    return result


@needs_eight
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "products", "block"),
    [("xla", 7, 16), ("tpu", 9, 32), ("gpu", 9, 32)],
)
def test_eight_devices_do_what_the_method_needs_and_known_extras(
    kernel, products, block, monkeypatch, interpreted_kernels
):
    monkeypatch.setattr(run_spec, "attention_kernel", lambda *_: kernel)
    monkeypatch.setattr(config_checks, "PALLAS_BLOCK_SIZES", (32,))
    result = counted(
        "ici_fsdp_parallelism=2",
        "ici_tensor_parallelism=4",
        f"rollout_block_size={block}",
        f"attention={'blockwise' if kernel == 'xla' else 'pallas'}",
    )
    assert ("attention_pairs" in result) == (
        kernel == "xla"
    )  # of blocks that kernels choose themselves
    parts = dict(result["model_flops"])
    tokens, H, D, K = result["tokens"], 64, 64, 3
    # One block of keys holds both halves of the scores, and the backward pass makes them again:
    # seven products instead of six, or nine in two kernels. Each block of rows makes its teachers'
    # logits over the draft vocabulary, K - 1 of them for the next block too.
    # A GPU's kernels make heads of 8 16 wide.
    wide = 2 if kernel == "gpu" else 1
    parts["target attention"] *= 2 * wide
    parts["draft attention"] *= 2 * wide * products / 6
    parts["teachers"] = 2 * H * D * result["computed_positions"] * (block + K - 1) / block
    rounding = result["computed_positions"] / result["supervised_positions"]
    for name in ("draft layer", "draft attention", "draft LM head", "target LM head"):
        parts[name] *= rounding  # row blocks are whole, and the LM head's block is the whole row
    assert result["traced_flops"] == pytest.approx(sum(parts.values()), rel=0.02)
    assert tokens == result["positions"] == 8 * 32
    if kernel != "xla":
        return  # the loops are not those that the device runs
    # A head that every device of a tensor axis repeats would cost three times as much. XLA makes
    # the target's keys and values twice: 8 layers of 2 x 4 heads of 8.
    twice = 8 * 2 * tokens * H * 2 * 4 * 8
    assert 0 <= result["compiled_flops"] - result["traced_flops"] <= 1.01 * twice


@pytest.mark.slow
def test_memory_grows_in_proportion_to_the_row_length():
    bytes_of = [
        counted(f"max_target_length={T}", "attention_block_size=16")["temporary_bytes"]
        for T in (512, 1024, 2048)
    ]
    first, second = np.diff(bytes_of)
    assert second < 2.3 * first  # twice the tokens; four times if anything were [T, T]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "{folder}"], "is a folder"),
        (["--json", "{folder}/no/x.json"], "there is no folder"),
        (["--steps", "0"], "1 or more"),
        (["--compare", ""], "the second setting"),
        (["--profile", __file__], "is a file"),
        (["--profile", "{folder}", "--compile_only"], "only compiled"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_compiled(flags, message, tmp_path, capsys):
    flags = [flag.format(folder=tmp_path) for flag in flags]
    with pytest.raises(SystemExit):
        benchmark.main(["benchmark.py", *SMALL, *flags])
    assert message in capsys.readouterr().err


def test_tokens_without_a_supervised_position_are_an_error():
    short = ["max_target_length=10" if "max_target" in key else key for key in SMALL]
    with pytest.raises(ConfigError, match="max_target_length=10 is too short"):
        benchmark.main(["benchmark.py", *short, "--tokens", "chats", "--compile_only"])


def test_conversations_fill_their_rows():
    result = counted(
        "max_target_length=2048", "per_device_batch_size=4", "rollout_block_size=64",
        "gradient_accumulation_steps=2", tokens="chats",
    )  # fmt: skip
    assert result["tokens"] >= 0.97 * result["positions"]
    assert result["computed_positions"] <= 1.05 * result["supervised_positions"]
    batch = conversations(1, 64, 2048, 128)
    real = batch["segment_ids"] > 0
    share = (batch["turn_ids"] > 0).sum() / real.sum()
    assert 0.6 < share < 0.75  # replies are twice as long as requests
    begins = (batch["positions"] == 0) & real
    assert (np.diff(batch["segment_ids"], axis=-1)[begins[..., 1:]] == 1).all()


@pytest.mark.slow
def test_a_comparison_alternates_and_all_is_written(tmp_path, capsys):
    path = tmp_path / "result.json"
    flags = [
        "--steps",
        "2",
        "--compare",
        "rollout_block_size=32 loss=lk_alpha target_layer_ids='[1, 3, 5]'",
        "--profile",
        str(tmp_path / "trace"),
        "--json",
        str(path),
    ]
    assert benchmark.main(["benchmark.py", *SMALL, *flags]) == 0
    printed = capsys.readouterr().out
    for words in ("GFLOP a step", "MiB temporary", "tokens/s/device", "MFU", "second / first"):
        assert words in printed
    result = json.loads(path.read_text())
    assert len(result["ratios"]) == 2
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    for setting in result["settings"]:
        assert set(setting["breakdown"]) == {"target", "rollout", "loss", "optimizer"}
        low, median, high = setting["step_seconds"]
        assert 0 < low <= median <= high
        assert setting["computed_positions"] >= setting["supervised_positions"] > 0


def test_it_imports_no_data_and_no_checkpoint_library():
    blocked = "etils grain orbax safetensors transformers tokenizers tensorboardX sentencepiece"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked.split()!r})); "
        f"sys.argv = ['benchmark.py']; from MaxDraft import benchmark; "
        f"sys.exit(benchmark.main(['benchmark.py', *{[*SMALL, '--compile_only']!r}]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "compile " in ran.stdout


def test_a_model_without_dimensions_names_the_key(tmp_path):
    with pytest.raises(ConfigError, match="target_config"):
        benchmark.main(["benchmark.py", BASE, "model_name=default"])


def test_the_embedded_targets_dimensions_are_known():
    dims = target_dims(pyconfig.initialize(["benchmark.py", BASE], reads_files=False))
    assert (dims.hidden_size, dims.num_layers, dims.vocab_size) == (128, 8, 2048)


@pytest.mark.parametrize(
    ("topology", "platform"), [("v99:7x7", "tpu"), ("h300:1", "tpu"), ("h100:some", "cuda")]
)
def test_unknown_devices_are_an_error_with_the_fix(topology, platform):
    with pytest.raises(TopologyError, match=rf"--topology {topology}: .*\n.*DEVICE={platform} "):
        benchmark.main(["benchmark.py", *SMALL, "--topology", topology])
