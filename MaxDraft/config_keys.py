"""What every key of configs/base.yml may hold: one row a key.

base.yml keeps a key's default and its comment; this table keeps the rest: its type, the choices or
the range of its value, whether a run may go on under another value, and whether a model file may
set it. Ranges end where a value can only be a slip of the finger, so that such a value is an error
before anything is allocated and not a process that hangs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """The interval of a number's values; `also` is one more value with a meaning of its own."""

    low: float
    high: float
    low_is_open: bool = False
    high_is_open: bool = False
    also: int | None = None

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_is_open else value >= self.low
        below = value < self.high if self.high_is_open else value <= self.high
        return (above and below) or (self.also is not None and value == self.also)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.low_is_open else f"at least {self.low}"
        high = f"below {self.high}" if self.high_is_open else f"at most {self.high}"
        return f"{low} and {high}" + (f", or {self.also}" if self.also is not None else "")


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of the table.

    type: bool, int, float, str, list or dict.
    choices: the values a text may have. range: the values a number may have.
    elements: what a list holds: "integers", "names" or "axis rules".
    path: the text is the path of a file or folder, in which ~ is the home folder.
    resume: a run may be resumed under another value. It may where a key decides where a run is, how
        fast it is, what it prints or how it is evaluated, and not what its parameters become.
    model_file: a model file may set it. It may not set what belongs to one run or one machine,
        since it would decide for everybody who trains a head for that model.
    needs: (another key, the values under which this key has an effect).
    """

    type: type
    choices: tuple[str, ...] = ()
    range: Range | None = None
    elements: str = ""
    path: bool = False
    resume: bool = False
    model_file: bool = True
    needs: tuple[str, tuple[Any, ...]] | None = None


# Counts of steps, tokens, bytes of memory and devices end here.
STEPS = Range(1, 1_000_000_000)
STEPS_OR_ALL = Range(1, 1_000_000_000, also=-1)
TOKENS = Range(1, 16_777_216)
BATCH = Range(1, 65_536)
HEADS = Range(0, 4_096)
SEED = Range(0, 4_294_967_295)  # numpy and Grain take 32 bits
PARALLELISM = Range(1, 1_000_000, also=-1)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, high_is_open=True)


def _path(**row: Any) -> Key:
    """A path belongs to one machine."""
    return Key(str, path=True, model_file=False, **row)


def _profiler_steps(low: int) -> Key:
    """A longer trace is too large for the programs that show it."""
    steps = Range(low, 1_000)
    return Key(int, range=steps, resume=True, model_file=False, needs=("profiler", ("xplane",)))


def _parallelism() -> Key:
    return Key(int, range=PARALLELISM, resume=True)


KEYS: Mapping[str, Key] = MappingProxyType(
    {
        # the run
        "model_name": Key(str, model_file=False),
        "run_name": Key(str, resume=True, model_file=False),
        "base_output_directory": _path(resume=True),
        # the target. Paths may change on resume: what they hold is part of the run's identity.
        "target_path": _path(resume=True),
        "target_config": Key(dict),
        "target_layer_ids": Key(list, elements="integers"),
        "weight_dtype": Key(str, choices=("bfloat16", "float32")),
        "target_quantization": Key(str, choices=("dequantize", "keep_quantized")),
        "trust_remote_code": Key(bool, resume=True),
        # the draft head
        "drafter": Key(str),
        "draft_vocab_size": Key(int, range=TOKENS),
        "draft_intermediate_size": Key(int, range=Range(0, 1_048_576)),
        "draft_num_attention_heads": Key(int, range=HEADS),
        "draft_num_key_value_heads": Key(int, range=HEADS),
        "draft_head_dim": Key(int, range=Range(0, 4_096)),
        "draft_fc_norm": Key(bool),
        "draft_norm_output": Key(bool),
        "load_parameters_path": _path(),
        "init_weights_seed": Key(int, range=SEED),
        # the rollout and its loss
        "ttt_length": Key(int, range=Range(1, 64)),
        "ttt_loss_decay": Key(float, range=Range(0, 1, low_is_open=True)),
        "loss": Key(str, choices=("kl", "lk_hybrid", "lk_alpha")),
        "loss_alignment": Key(str, choices=("serving", "specforge")),
        "loss_denominator": Key(str, choices=("supervised", "specforge")),
        "dtype": Key(str, choices=("bfloat16", "float32")),
        "matmul_precision": Key(str, choices=("default", "high", "highest")),
        "attention": Key(str, choices=("blockwise", "pallas"), resume=True),
        "attention_block_size": Key(int, range=TOKENS, resume=True),
        "vocab_block_size": Key(int, range=TOKENS, resume=True),
        "rollout_block_size": Key(int, range=TOKENS, resume=True),
        # data
        "dataset_type": Key(str, choices=("grain",)),
        "grain_train_files": Key(str, resume=True, model_file=False),
        "grain_eval_files": Key(str, resume=True, model_file=False),
        "eval_fraction": Key(float, range=BELOW_ONE),
        "tokenizer_path": _path(resume=True),
        "chat_template": Key(str, path=True),
        "loss_turns": Key(str, choices=("all", "last")),
        "max_target_length": Key(int, range=TOKENS),
        "truncation_policy": Key(str, choices=("truncate", "drop")),
        "max_skipped_fraction": Key(float, range=FRACTION, resume=True),
        "data_shuffle_seed": Key(int, range=SEED),
        "grain_worker_count": Key(int, range=Range(0, 1_024), resume=True),
        "grain_prefetch_buffer_size": Key(int, range=Range(1, 10_000), resume=True),
        # training. The rows of an optimizer step are part of the run's identity, so that batch,
        # accumulation and mesh may change as long as their product is the same.
        "steps": Key(int, range=STEPS_OR_ALL),
        "num_epoch": Key(int, range=Range(1, 100_000), needs=("steps", (-1,))),
        "per_device_batch_size": Key(int, range=BATCH, resume=True),
        "gradient_accumulation_steps": Key(int, range=BATCH, resume=True),
        "opt_type": Key(str, choices=("adamw", "muon")),
        "learning_rate": Key(float, range=Range(0, 100, low_is_open=True)),
        "lr_schedule_type": Key(str, choices=("cosine", "wsd")),
        "learning_rate_final_fraction": Key(float, range=FRACTION),
        "warmup_steps_fraction": Key(float, range=BELOW_ONE),
        "wsd_decay_steps_fraction": Key(
            float, range=BELOW_ONE, needs=("lr_schedule_type", ("wsd",))
        ),
        "gradient_clipping_threshold": Key(float, range=Range(0, 1_000_000_000)),
        "adam_b1": Key(float, range=BELOW_ONE),
        "adam_b2": Key(float, range=BELOW_ONE),
        "adam_eps": Key(float, range=Range(0, 1, low_is_open=True)),
        "adam_weight_decay": Key(float, range=Range(0, 100)),
        "muon_beta": Key(float, range=BELOW_ONE, needs=("opt_type", ("muon",))),
        "abort_on_nan_loss": Key(bool, resume=True),
        "eval_interval": Key(int, range=STEPS_OR_ALL, resume=True),
        "eval_steps": Key(int, range=STEPS_OR_ALL, resume=True),
        # parallelism
        "mesh_axes": Key(list, elements="names", resume=True),
        "ici_data_parallelism": _parallelism(),
        "ici_fsdp_parallelism": _parallelism(),
        "ici_expert_parallelism": _parallelism(),
        "ici_tensor_parallelism": _parallelism(),
        "dcn_data_parallelism": _parallelism(),
        "dcn_fsdp_parallelism": _parallelism(),
        "dcn_expert_parallelism": _parallelism(),
        "dcn_tensor_parallelism": _parallelism(),
        "logical_axis_rules": Key(list, elements="axis rules", resume=True),
        "skip_jax_distributed_system": Key(
            bool, resume=True, model_file=False, needs=("distributed_coordinator", ("",))
        ),
        "distributed_coordinator": Key(str, resume=True, model_file=False),
        "distributed_num_processes": Key(
            int, range=Range(1, 1_000_000), resume=True, model_file=False
        ),
        "distributed_process_id": Key(
            int, range=Range(0, 1_000_000), resume=True, model_file=False
        ),
        # checkpoints and logs
        "enable_checkpointing": Key(bool, resume=True),
        "async_checkpointing": Key(bool, resume=True, needs=("enable_checkpointing", (True,))),
        "checkpoint_period": Key(
            int, range=STEPS, resume=True, needs=("enable_checkpointing", (True,))
        ),
        "max_num_checkpoints_to_keep": Key(
            int, range=Range(1, 100_000), resume=True, needs=("enable_checkpointing", (True,))
        ),
        "log_period": Key(int, range=STEPS, resume=True),
        "metrics_file": Key(str, resume=True),
        "enable_tensorboard": Key(bool, resume=True),
        "profiler": Key(str, choices=("", "xplane"), resume=True, model_file=False),
        "skip_first_n_steps_for_profiler": _profiler_steps(low=0),
        "profiler_steps": _profiler_steps(low=1),
        "jax_cache_dir": _path(resume=True),
        # evaluation by real decoding, and export
        "run_checkpoint": Key(str, choices=("best", "latest"), resume=True),
        "decode_num_prompts": Key(int, range=Range(1, 1_000_000), resume=True),
        "decode_batch_size": Key(int, range=BATCH, resume=True),
        "decode_max_new_tokens": Key(int, range=TOKENS, resume=True),
        "decode_draft_steps": Key(int, range=Range(1, 64), resume=True),
        "decode_recurrent_position_offset": Key(int, range=Range(0, 1), resume=True),
        "decode_temperature": Key(float, range=Range(0, 100), resume=True),
        "export_path": _path(resume=True),
    }
)


def may_change_on_resume(key: str) -> bool:
    """Whether a run may be resumed under another value of `key`; not under one that is unknown."""
    return key in KEYS and KEYS[key].resume
