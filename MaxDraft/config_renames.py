"""Names that keys, values and models had before or have in MaxText, and what they are here.

The configuration of an old run is read under the new names, so that it can still be resumed,
evaluated and exported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from MaxDraft.config_yaml import nearest

# Old key -> new key.
RENAMED_KEYS = {
    "optimizer": "opt_type",
    "learning_rate_schedule": "lr_schedule_type",
    "decay_steps_fraction": "wsd_decay_steps_fraction",
    "attention_kernel": "attention",
}

# New key -> {old value: new value}.
RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {
    "attention": {"xla": "blockwise"},
    "loss_denominator": {"counted": "supervised"},
    "target_quantization": {"keep": "keep_quantized"},
    "distributed_coordinator": {"auto": ""},
}

# Removed key -> the value under which a run trained as every run trains now, and why it went.
REMOVED_KEYS: Mapping[str, tuple[Any, str]] = {
    "later_step_share": (1.0, "every position trains all ttt_length steps: fewer cost acceptance"),
    "remat_policy": (None, "the activations of one block are stored, and blocks are small enough"),
}

# MaxText's key -> what stands for it here.
MAXTEXT_KEYS = {
    "abort_on_inf_loss": "abort_on_nan_loss stops at either",
    "attention_type": "the target's config.json says which attention its layers have",
    "chat_template_path": "it is chat_template here",
    "compile_topology": "it is benchmark.py --topology NAME here",
    "enable_data_shuffling": "the data is always shuffled, by data_shuffle_seed",
    "eval_per_device_batch_size": "evaluation takes per_device_batch_size",
    "global_batch_size_to_train_on": "it is the product of per_device_batch_size, "
    "gradient_accumulation_steps and the number of devices",
    "grain_file_type": "the suffix of a data file says what it is",
    "hardware": "JAX takes the devices it finds; set JAX_PLATFORMS=cpu for the CPU",
    "hf_path": "give the files of the data set as grain_train_files",
    "hf_train_files": "it is grain_train_files here",
    "hf_eval_files": "it is grain_eval_files here",
    "learning_rate_schedule_steps": "a schedule ends with the training, at steps",
    "load_full_state_path": "the same command resumes its run",
    "muon_consistent_rms": "it is always 0.2, so that AdamW's learning rates serve",
    "muon_weight_decay": "it is adam_weight_decay for either optimizer",
    "override_logical_axis_rules": "a rule replaces the rule of its name, and no other",
    "packing": "conversations are always packed",
    "quantization": "it is target_quantization here, for the target alone",
    "tensorboard_dir": "it is the folder tensorboard in the run's folder",
    "tokenizer_type": "the tokenizer is the one in tokenizer_path, in Hugging Face's format",
    "use_chat_template": "conversations always pass through the chat template",
    "wsd_decay_style": "the decay of wsd is linear",
}

# Key -> {MaxText's value: what stands for it here}.
MAXTEXT_VALUES: Mapping[str, Mapping[str, str]] = {
    "attention": {
        "autoselected": "attention=blockwise runs on every platform",
        "dot_product": "attention=blockwise is exact too, without scores of size [T, T]",
        "flash": "attention=pallas is the kernel for a TPU or GPU",
        "cudnn_flash_te": "attention=pallas is the kernel for a TPU or GPU",
    },
    "dataset_type": {
        "hf": "give the files of the data set as grain_train_files",
        "tfds": "give JSONL files of conversations as grain_train_files",
        "synthetic": "benchmark.py measures a step on synthetic tokens",
    },
    "profiler": {"nsys": "run the command under nsys, with profiler left empty"},
}

# MaxText's model name -> ours.
MAXTEXT_MODELS = {
    "deepseek2-16b": "deepseek-v2-lite",
    "deepseek2-236b": "deepseek-v2",
    "deepseek3-671b": "deepseek-v3",
    "kimi-k2-1t": "kimi-k2",
    "llama4-17b-16e": "llama4-scout",
    "llama4-17b-128e": "llama4-maverick",
    "qwen3-480b-a35b": "qwen3-coder-480b-a35b",
}


def explain_key(key: str, known: Iterable[str]) -> str:
    """For a key that there is not: what became of it, what stands for it, or a near one."""
    name = key.lstrip("-")
    if name in RENAMED_KEYS:
        return f"; {name} is now {RENAMED_KEYS[name]}"
    if name in REMOVED_KEYS:
        return f"; {name} was removed: {REMOVED_KEYS[name][1]}. Leave it out"
    if name in MAXTEXT_KEYS:
        return f"; {MAXTEXT_KEYS[name]}"
    # Keys share words such as type and dtype; below 0.75 a shared word is all that is alike.
    return nearest(name, known, cutoff=0.75) or "; --help lists the keys, configs/base.yml too"


def explain_value(key: str, value: str, choices: Iterable[str]) -> str:
    """For a value that a key cannot have: the new one, what stands for it, or a near one."""
    new = RENAMED_VALUES.get(key, {}).get(value)
    if new is not None:
        return f"; {key}={value} is now {key}={new}"
    if value in MAXTEXT_VALUES.get(key, {}):
        return f"; {MAXTEXT_VALUES[key][value]}"
    return nearest(value, choices)


def explain_model(name: str, known: Iterable[str]) -> str:
    """For a model that has no file: the name it has here, or a near one.

    A name with other numbers is another size or release, whose weights differ: it is not near.
    """
    ours = MAXTEXT_MODELS.get(name)
    if ours:
        return f"; MaxText's {name} is {ours!r} here"
    numbers = re.findall(r"\d+", name)
    return nearest(name, [other for other in known if re.findall(r"\d+", other) == numbers])


def modernized(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run's configuration as a run of today would have them.

    Keys and values bear their new names. A key that came later has its default, which is what
    older runs did. A removed key goes if the run trained as all do now, and stays if not, so that
    resuming the run names it.
    """
    modern = dict(defaults)
    for old, value in values.items():
        if old in REMOVED_KEYS and REMOVED_KEYS[old][0] in (None, value):
            continue
        key = RENAMED_KEYS.get(old, old)
        renamed = RENAMED_VALUES.get(key, {})
        modern[key] = renamed.get(value, value) if isinstance(value, str) else value
    return modern
