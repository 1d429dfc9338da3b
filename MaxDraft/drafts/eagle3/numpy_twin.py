"""The draft head as the serving engines compute it, in plain NumPy, from an exported folder.

A second implementation on purpose: it shares nothing with drafts/ but the folder, so that a mistake
in either shows. As in the engines, tensors are [out, in], rope comes from the top-level fields of
config.json only, with theta 10000 where there is none, and d2t is added to the draft id.

    prefill   row i reads [norm(embedding of x[i+1]), norm(fc(features[i]))], i = 0..R-1
    step 0    logits of the last row
    step k    reads x[R+k] and its own un-normed output, one position further on

R rows, K steps, S new rows, H hidden size, D draft vocabulary, M key/value heads, d head size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from MaxDraft.errors import UserError

_ENGINES_THETA = 10000.0  # what engines take without a word where rope_theta is missing


class EngineHead:
    """The head as an engine builds it from an exported folder, in float32 NumPy."""

    def __init__(self, folder: Path):
        self.config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / "model.safetensors")
        self._d2t = tensors.pop("d2t")
        self.t2d = tensors.pop("t2d", None)
        self._w = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        self._eps = np.float32(self.config["rms_norm_eps"])
        self._frequencies, self._cos_scale = engine_frequencies(self.config)

    def target_ids(self) -> np.ndarray:
        """int64 [D]: the target's token of every draft token."""
        return np.arange(len(self._d2t)) + self._d2t

    def logits(
        self,
        embeddings: np.ndarray,  # float32 [R + K, H] of x[0..R+K-1]; x[0] is never read
        features: np.ndarray,  # float32 [R, 3H]
        positions: np.ndarray,  # int [R]
        steps: int,
        recurrent_position_offset: int = 0,
    ) -> np.ndarray:  # float32 [K, D]
        """Logits of a chain of K drafts from the last row.

        recurrent_position_offset: added to the positions from step 1 on, where the head reads its
        own output: 0 in vLLM and SGLang, 1 in sglang-jax.
        """
        R = len(features)
        keys = values = None
        state, read, at = features @ self._w["fc.weight"].T, embeddings[1 : R + 1], positions
        out = []
        for k in range(steps):
            state, keys, values = self._layer(read, state, at, keys, values)
            state = state[-1:]
            at = positions[-1:] + 1 + k + recurrent_position_offset
            read = embeddings[R + k + 1 : R + k + 2]
            out.append(self._norm(state, "norm.weight")[0] @ self._w["lm_head.weight"].T)
        return np.stack(out)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self._eps) * self._w[name]

    def _project(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self._w[f"midlayer.self_attn.{name}_proj.weight"].T
        return y.reshape(len(x), -1, self.config["head_dim"])

    def _turn(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        angles = positions[:, None].astype(np.float32) * self._frequencies
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        return self._cos_scale * np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def _layer(self, read, state, positions, keys, values):
        """New rows [S, H] over the cache -> (state [S, H], keys, values [., M, d])."""
        x = np.concatenate(
            [
                self._norm(read, "midlayer.input_layernorm.weight"),
                self._norm(state, "midlayer.hidden_norm.weight"),
            ],
            axis=-1,
        )
        q = self._turn(self._project(x, "q"), positions)
        k, v = self._turn(self._project(x, "k"), positions), self._project(x, "v")
        keys = k if keys is None else np.concatenate([keys, k])
        values = v if values is None else np.concatenate([values, v])
        group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        attended = np.empty_like(q)
        seen = len(keys) - len(q)
        for row in range(len(q)):
            for head in range(q.shape[1]):
                scores = keys[: seen + row + 1, head // group] @ q[row, head]
                weights = np.exp((scores - scores.max()) / np.float32(math.sqrt(q.shape[-1])))
                mixed = weights @ values[: seen + row + 1, head // group]
                attended[row, head] = mixed / weights.sum()
        state = state + attended.reshape(len(q), -1) @ self._w["midlayer.self_attn.o_proj.weight"].T
        y = self._norm(state, "midlayer.post_attention_layernorm.weight")
        gate = y @ self._w["midlayer.mlp.gate_proj.weight"].T
        up = y @ self._w["midlayer.mlp.up_proj.weight"].T
        swish = gate / (1 + np.exp(-gate))
        return state + (swish * up) @ self._w["midlayer.mlp.down_proj.weight"].T, keys, values


def engine_frequencies(config: Mapping[str, Any]) -> tuple[np.ndarray, np.float32]:
    """Top-level rope_theta and rope_scaling -> (float32 [d/2] radians per position, cos scale)."""
    d, theta = config["head_dim"], config.get("rope_theta", _ENGINES_THETA)
    scaling = config.get("rope_scaling") or {}
    kind, factor = scaling.get("rope_type", "default"), scaling.get("factor", 1.0)
    pairs = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
    plain = (1 / np.float32(theta) ** pairs).astype(np.float32)
    if kind == "default":
        return plain, np.float32(1)
    if kind == "linear":
        return plain / np.float32(factor), np.float32(1)
    length = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = length * plain / (2 * math.pi)  # over the original context
        keep = np.where(turns < low, 0, np.where(turns > high, 1, (turns - low) / (high - low)))
        return (plain * (keep + (1 - keep) / factor)).astype(np.float32), np.float32(1)
    if kind != "yarn":
        raise UserError(f"config.json: rope_scaling of type {kind!r} is not known to engines")

    def pair_that_turns(times: float) -> float:
        return d * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    ends = [pair_that_turns(scaling["beta_fast"]), pair_that_turns(scaling["beta_slow"])]
    if scaling.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], d - 1)
    slowed = np.clip((np.arange(d // 2) - first) / max(last - first, 0.001), 0, 1)
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    scale = np.float32(scaling.get("attention_factor", usual))
    return (plain * (1 - slowed + slowed / factor)).astype(np.float32), scale
