"""The draft head as the serving engines compute it, in plain NumPy, from an exported folder.

A second implementation on purpose: it shares nothing with MaxDraft but the folder, so that a
mistake in either shows. As in the engines, tensors are [out, in], rope comes from the top-level
fields of config.json only, with theta 10000 where there is none, and d2t is added to the draft id.

    prefill   position i reads [norm(embedding of x[i+1]), norm(fc(aux_hidden_states[i]))], i < T
    step 0    logits of the last position
    step k    reads x[T+k] and its own output of step k-1, one position further on

EAGLE-3.1 (arXiv:2605.09992), two flags of config.json:

    fc_norm       fc reads the aux hidden states of three layers, each behind an RMSNorm of its own
    norm_output   y = norm(state) is the output: lm_head reads it as it is, and so does step k

T positions of the prefill, K steps, S new positions, H hidden size, D draft vocabulary, N query
heads, M key/value heads, d head size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from MaxDraft.errors import UserError

_ENGINES_THETA = 10000.0  # what engines take without a word where rope_theta is missing


class NumpyTwin:
    """The head as an engine builds it from an exported folder, in float32 NumPy."""

    def __init__(self, folder: Path):
        self.config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        # Here, since the benchmark knows drafters where safetensors is not installed.
        from safetensors.numpy import load_file

        tensors = load_file(Path(folder) / "model.safetensors")
        self._d2t = tensors.pop("d2t")
        tensors.pop("t2d", None)  # for tools; no engine reads it
        self._weights = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        self._eps = np.float32(self.config["rms_norm_eps"])
        self._norm_output = bool(self.config.get("norm_output"))
        self._frequencies, self._attention_scaling = rotary_frequencies(self.config)

    def target_ids(self) -> np.ndarray:
        """int64 [D]: the target's token of every draft token."""
        return np.arange(len(self._d2t)) + self._d2t

    def logits(
        self,
        embeddings: np.ndarray,  # float32 [T + K, H] of x[0..T+K-1]; x[0] is never read
        aux_hidden_states: np.ndarray,  # float32 [T, 3H]
        positions: np.ndarray,  # int [T]
        steps: int,
        recurrent_position_offset: int = 0,
    ) -> np.ndarray:  # float32 [K, D]
        """Logits of a chain of K drafts from the last position.

        recurrent_position_offset: added to the positions from step 1 on, where the head reads its
        own output: 0 in vLLM and SGLang, 1 in sglang-jax.
        """
        T = len(aux_hidden_states)
        keys = values = None
        state, read, position = self._fused(aux_hidden_states), embeddings[1 : T + 1], positions
        logits = []
        for k in range(steps):
            state, keys, values = self._layer(read, state, position, keys, values)
            state = state[-1:]
            normed = self._norm(state, "norm.weight")
            if self._norm_output:
                state = normed
            logits.append(normed[0] @ self._weights["lm_head.weight"].T)
            position = positions[-1:] + 1 + k + recurrent_position_offset
            read = embeddings[T + k + 1 : T + k + 2]
        return np.stack(logits)

    def _fused(self, aux_hidden_states: np.ndarray) -> np.ndarray:
        if self.config.get("fc_norm"):
            parts = np.split(aux_hidden_states, 3, axis=-1)
            parts = [self._norm(part, f"fc_norm.{k}.weight") for k, part in enumerate(parts)]
            aux_hidden_states = np.concatenate(parts, axis=-1)
        return aux_hidden_states @ self._weights["fc.weight"].T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self._eps) * self._weights[name]

    def _project(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self._weights[f"midlayer.self_attn.{name}_proj.weight"].T
        return y.reshape(len(x), -1, self.config["head_dim"])

    def _rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        angles = positions[:, None].astype(np.float32) * self._frequencies
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        rotated = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        return self._attention_scaling * rotated

    def _layer(self, read, state, positions, keys, values):
        """New positions [S, H] over the cache -> residual stream [S, H], keys, values [., M, d]."""
        x = np.concatenate(
            [
                self._norm(read, "midlayer.input_layernorm.weight"),
                self._norm(state, "midlayer.hidden_norm.weight"),
            ],
            axis=-1,
        )
        q = self._rotate(self._project(x, "q"), positions)
        k, v = self._rotate(self._project(x, "k"), positions), self._project(x, "v")
        keys = k if keys is None else np.concatenate([keys, k])
        values = v if values is None else np.concatenate([values, v])
        attended = self._attend(q, keys, values)
        output = self._weights["midlayer.self_attn.o_proj.weight"]
        state = state + attended.reshape(len(q), -1) @ output.T
        y = self._norm(state, "midlayer.post_attention_layernorm.weight")
        gate = y @ self._weights["midlayer.mlp.gate_proj.weight"].T
        up = y @ self._weights["midlayer.mlp.up_proj.weight"].T
        silu = gate / (1 + np.exp(-gate))
        down = self._weights["midlayer.mlp.down_proj.weight"]
        return state + (silu * up) @ down.T, keys, values

    def _attend(self, q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Causal attention of the last positions [S, N, d] over all positions' keys [., M, d]."""
        group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        attended = np.empty_like(q)
        before = len(keys) - len(q)
        for i in range(len(q)):
            for head in range(q.shape[1]):
                scores = keys[: before + i + 1, head // group] @ q[i, head]
                weights = np.exp((scores - scores.max()) / np.float32(math.sqrt(q.shape[-1])))
                mixed = weights @ values[: before + i + 1, head // group]
                attended[i, head] = mixed / weights.sum()
        return attended


def rotary_frequencies(config: Mapping[str, Any]) -> tuple[np.ndarray, np.float32]:
    """Top-level rope_theta and rope_scaling -> float32 [d/2] radians per position, and the factor
    of cos and sin; UserError for a scaling that engines do not know.

    The power is taken in float64 and rounded once: float32 powers differ between libraries.
    """
    d, theta = config["head_dim"], config.get("rope_theta", _ENGINES_THETA)
    scaling = config.get("rope_scaling") or {}
    rope_type, factor = scaling.get("rope_type", "default"), scaling.get("factor", 1.0)
    exponents = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
    periods = np.power(np.float64(theta), exponents, dtype=np.float64).astype(np.float32)
    unscaled = np.float32(1) / periods
    if rope_type == "default":
        return unscaled, np.float32(1)
    if rope_type == "linear":
        return unscaled / np.float32(factor), np.float32(1)
    if rope_type == "llama3":
        return _llama3(unscaled, scaling), np.float32(1)
    if rope_type != "yarn":
        raise UserError(f"config.json: rope_scaling of type {rope_type!r} is not known to engines")
    default_scale = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    scale = np.float32(scaling.get("attention_factor", default_scale))
    return _yarn(unscaled, d, theta, scaling), scale


def _llama3(unscaled: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Slow pairs are slowed by the factor, fast ones kept, with a ramp over the turns between."""
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * unscaled / (2 * math.pi)  # over the original context
    ramp = (turns - low) / (high - low) if high > low else np.zeros_like(turns)
    keep = np.where(turns < low, 0, np.where(turns > high, 1, ramp))
    return (unscaled * (keep + (1 - keep) / factor)).astype(np.float32)


def _yarn(unscaled: np.ndarray, d: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """The ramp goes over the pairs, between those that turn beta_fast and beta_slow times."""
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def pair_that_turns(times: float) -> float:
        return d * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    ends = [pair_that_turns(scaling["beta_fast"]), pair_that_turns(scaling["beta_slow"])]
    if scaling.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], d - 1)
    slowed = np.clip((np.arange(d // 2) - first) / max(last - first, 0.001), 0, 1)
    return (unscaled * (1 - slowed + slowed / factor)).astype(np.float32)
