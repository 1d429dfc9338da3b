"""A small random target on disk, and train.py in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml
from data_helpers import CHATML, make_tokenizer, many_records, write_lines
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 7, 4, 2, 8

# Programs compile fast this way; the same for every run that is compared with another.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def write_target(folder: Path, seed: int = 0, **config_changes) -> Path:
    """A random Llama in Hugging Face format, with a tokenizer and a chat template."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.save_pretrained(folder)
    V = len(tokenizer)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    } | config_changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(target_tensors(V, seed), folder / "model.safetensors")
    return folder


def target_tensors(V: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> np.ndarray:
        return (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((V, WIDTH)).astype(np.float32),
        "model.norm.weight": np.ones(WIDTH, np.float32),
        "lm_head.weight": matrix(V, WIDTH) * 3,
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors[at + "input_layernorm.weight"] = np.ones(WIDTH, np.float32)
        tensors[at + "post_attention_layernorm.weight"] = np.ones(WIDTH, np.float32)
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(rows * HEAD_DIM, WIDTH)
        tensors[at + "self_attn.o_proj.weight"] = matrix(WIDTH, HEADS * HEAD_DIM)
        tensors[at + "mlp.gate_proj.weight"] = matrix(48, WIDTH)
        tensors[at + "mlp.up_proj.weight"] = matrix(48, WIDTH)
        tensors[at + "mlp.down_proj.weight"] = matrix(WIDTH, 48)
    return tensors


class Job:
    """train.py, evaluate.py or export.py on a small target under `folder`."""

    def __init__(self, folder: Path, devices: int = 1):
        self.folder, self.devices = folder, devices
        self.target, self.data = folder / "target", folder / "data.jsonl"
        if not self.target.exists():
            write_target(self.target)
            write_lines(self.data, many_records(60))

    def keys(self, **changes) -> list[str]:
        keys = {
            # No model file describes this target: every key that matters stands here.
            "model_name": "tiny",
            "target_path": self.target,
            "grain_train_files": self.data,
            "base_output_directory": self.folder / "runs",
            "run_name": "r",
            "jax_cache_dir": self.folder / "jax-cache",
            "steps": 24,
            "ttt_length": 3,
            "max_target_length": 64,
            "per_device_batch_size": 8 // self.devices,
            "gradient_accumulation_steps": 1,
            "draft_vocab_size": 200,
            "learning_rate": 0.003,
            "eval_fraction": 0.2,
            "eval_interval": 10,
            "eval_steps": 2,
            "checkpoint_period": 5,
            "log_period": 1,
            "enable_tensorboard": False,
            "decode_num_prompts": 3,
            "decode_max_new_tokens": 12,
            "decode_temperature": 0,
        } | changes
        return [f"{key}={value}" for key, value in keys.items()]

    def start(self, script: str = "train.py", arguments: list[str] | None = None, **changes):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("M_")}
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={self.devices} {FAST}"
        return subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "MaxDraft" / script),
                str(ROOT / "configs" / "base.yml"),
                *(self.keys(**changes) if arguments is None else arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=self.folder,
        )

    def run(self, script: str = "train.py", status: int = 0, **changes) -> str:
        """Runs to the end -> what it printed; its exit status must be `status`."""
        return self._finish(self.start(script, **changes), status)

    def run_with(self, script: str, arguments: list[str], status: int = 0) -> str:
        return self._finish(self.start(script, arguments), status)

    def _finish(self, process, status: int) -> str:
        text = process.communicate()[0]
        assert process.returncode == status, text
        return text

    def signal_after(self, line: str, number: signal.Signals, **changes) -> tuple[int, str]:
        """Sends a signal once a line begins with `line` -> exit status, output."""
        process, printed = self.start(**changes), []
        for text in process.stdout:
            printed.append(text)
            if text.startswith(line):
                process.send_signal(number)
                break
        printed.append(process.communicate()[0])
        return process.returncode, "".join(printed)

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "r"

    def checkpoints(self) -> list[int]:
        folder = self.run_folder / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())

    def saved(self, step: int) -> dict[str, np.ndarray]:
        """Everything that training changes, by path, from a checkpoint."""
        arrays = {}
        for item in ("params", "optimizer"):
            folder = self.run_folder / "checkpoints" / str(step) / item
            reader = ocp.PyTreeCheckpointer()
            shapes = reader.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = reader.restore(folder, restore_args=as_numpy)
            for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
                arrays[item + jax.tree_util.keystr(path)] = np.asarray(value)
        return arrays

    def config(self) -> dict:
        return yaml.safe_load((self.run_folder / "config.yml").read_text())


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert value.tobytes() == b[name].tobytes(), name
