"""How the files of a checkpoint declare that its weights are quantized.

    config.json            quantization_config, of the model or of its text_config; it is named
                           compression_config in older files of compressed-tensors, and
                           quantization in those of MLX
    hf_quant_config.json   ModelOpt's own file; newer versions write the same into config.json
    quantize_config.json   AutoGPTQ's, quant_config.json AutoAWQ's: older than quantization_config

A declaration is read only where every field of it is known: a field of a new format may change what
the numbers mean. Only weights are quantized here; what a declaration says about activations is for
engines that multiply in 8 bits, and applying it would add their error to the target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from MaxDraft.convert.stored_tensor import CheckpointError

CONFIG_FIELDS = ("quantization_config", "compression_config", "quantization")
MODELOPT_FILE = "hf_quant_config.json"
DECLARATION_FILES = (MODELOPT_FILE, "quantize_config.json", "quant_config.json")
DEFAULT_BLOCK = (128, 128)
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")
# A scale for the whole tensor, and a scale for every output.
_MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
# The fields that are understood, by method. Lists of modules need not be read: whether a tensor is
# quantized stands in its dtype.
_FIELDS = {
    "fp8": {
        "activation_scheme",
        "dequantize",
        "expert_dtype",
        "fmt",
        "ignored_layers",
        "is_checkpoint_fp8_serialized",
        "kv_cache_scheme",
        "modules_to_convert",
        "modules_to_not_convert",
        "scale_fmt",
        "weight_block_size",
    },
    "fbgemm_fp8": {"activation_scale_ub", "modules_to_not_convert"},
    "mxfp4": {"dequantize", "modules_to_not_convert"},
    "modelopt": {
        "config_groups",
        "exclude_modules",
        "ignore",
        "kv_cache_quant_algo",
        "kv_cache_scheme",
        "input_activations",
        "producer",
        "quant_algo",
        "weights",
    },
    "compressed-tensors": {
        "config_groups",
        "format",
        "global_compression_ratio",
        "ignore",
        "kv_cache_scheme",
        "quantization_status",
        "run_compressed",
        "sparsity_config",
        "transform_config",
        "version",
    },
}
# A scale is multiplied in whichever of its formats it lies.
_FP8_VALUES = {"expert_dtype": ("fp8",), "fmt": ("e4m3",), "scale_fmt": ("float", "ue8m0")}
_GROUP_FIELDS = {"format", "input_activations", "output_activations", "targets", "weights"}
_WEIGHT_FIELDS = {
    "actorder",
    "block_structure",
    "dynamic",
    "group_size",
    "num_bits",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "strategy",
    "symmetric",
    "type",
    "zp_dtype",
}
# Formats that declare themselves without a quant_method, by a field that is theirs.
_UNNAMED = {
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "zero_point": "AWQ",
    "w_bit": "AWQ",
    "desc_act": "GPTQ",
    "group_size": "MLX",
}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What the files declare about the weights."""

    method: str
    block: tuple[int, int] = DEFAULT_BLOCK  # [outputs, inputs] of a block, where there are blocks
    in_blocks: bool = False  # whether the declaration says that there are blocks
    activations: bool = False  # whether it also says how activations are quantized

    def __str__(self) -> str:
        ignored = "; its quantization of activations is not applied" if self.activations else ""
        return f"{self.method} weights{ignored}"


def quantization_of(
    config: Mapping[str, Any], files: Mapping[str, Any] | None = None
) -> Quantization | None:
    """How the target's weights are quantized; None: they are not.

    config: of config.json. files: what DECLARATION_FILES hold, by file name, those that are there.
    CheckpointError for what cannot be read, and for two declarations that differ.
    """
    text_config = config.get("text_config")
    sources = {"config.json": config}
    if isinstance(text_config, Mapping):
        sources["text_config of config.json"] = text_config
    declarations = [
        (f"{name} in {place}" if name != "quantization_config" else place, source[name])
        for place, source in sources.items()
        for name in CONFIG_FIELDS
        if source.get(name)
    ]
    declarations += [(name, content) for name, content in (files or {}).items()]
    results = [(place, _declared(place, content)) for place, content in declarations]
    results = [(place, result) for place, result in results if result is not None]
    if not results:
        return None
    (first_place, first), *others = results
    for place, other in others:
        if (other.block, other.in_blocks) != (first.block, first.in_blocks):
            raise CheckpointError(
                f"{first_place} declares {first}, {place} declares {other}: remove whichever is "
                f"out of date"
            )
    return dataclasses.replace(first, activations=any(result.activations for _, result in results))


def _declared(place: str, content: Any) -> Quantization | None:
    """What one declaration says."""
    if not isinstance(content, Mapping):
        raise _refusal(place, f"quantization {content!r}")
    method = content.get("quant_method")
    producer = content.get("producer")
    by_modelopt = isinstance(producer, Mapping) and producer.get("name") == "modelopt"
    if place == MODELOPT_FILE or by_modelopt or str(method).startswith("modelopt"):
        return _modelopt(place, content)
    if method is None:
        names = [name for field, name in _UNNAMED.items() if field in content]
        raise _refusal(place, f"{names[0]} weights" if names else f"quantization {dict(content)!r}")
    if method == "fp8":
        return _plain_fp8(place, content)
    if method in ("fbgemm_fp8", "mxfp4"):
        _check_fields(place, content, _FIELDS[method], method)
        return Quantization(method, activations=method == "fbgemm_fp8")
    if method == "compressed-tensors":
        return _compressed_tensors(place, content)
    raise _refusal(place, f"quant_method {method!r}")


def _plain_fp8(place: str, content: Mapping[str, Any]) -> Quantization:
    _check_fields(place, content, _FIELDS["fp8"], "fp8")
    for field, values in _FP8_VALUES.items():
        if content.get(field) not in (*values, None):
            raise _refusal(place, f"fp8 with {field} {content[field]!r}")
    size = content.get("weight_block_size")
    return Quantization("fp8", _block(place, size), size is not None, True)


def _block(place: str, size: Any) -> tuple[int, int]:
    if size is None:
        return DEFAULT_BLOCK
    is_pair = isinstance(size, list | tuple) and len(size) == 2
    if not is_pair or any(type(one) is not int or one < 1 for one in size):
        raise _refusal(place, f"weight blocks of {size!r}")
    return (size[0], size[1])


def _modelopt(place: str, content: Mapping[str, Any]) -> Quantization | None:
    """ModelOpt's declaration, whose fields stand in "quantization" in a file of its own."""
    fields = _object(place, content, "quantization", "ModelOpt") or content
    algorithm = fields.get("quant_algo")
    quantizes_cache = bool(fields.get("kv_cache_quant_algo") or fields.get("kv_cache_scheme"))
    if algorithm is None and quantizes_cache:
        return None
    if not isinstance(algorithm, str) or algorithm.upper() not in _MODELOPT_ALGORITHMS:
        raise _refusal(place, f"ModelOpt quant_algo {algorithm!r}")
    _check_fields(place, fields, _FIELDS["modelopt"], "modelopt")
    groups = _object(place, fields, "config_groups", "ModelOpt")
    for group in (fields, *(_object(place, groups, name, "ModelOpt") for name in groups)):
        weights = _object(place, group, "weights", "ModelOpt")
        kind, bits = weights.get("type", "float"), weights.get("num_bits", 8)
        if (kind, bits) != ("float", 8):
            raise _refusal(place, f"ModelOpt {algorithm} with {bits!r}-bit {kind!r} weights")
    return Quantization(f"ModelOpt {algorithm.upper()}", activations=True)


def _compressed_tensors(place: str, content: Mapping[str, Any]) -> Quantization:
    method = "compressed-tensors"
    _check_fields(place, content, _FIELDS[method], method)
    sparsity = _object(place, content, "sparsity_config", method).get("format") or "dense"
    if sparsity != "dense":
        raise _refusal(place, f"{method} sparsity {sparsity!r}")
    if content.get("transform_config"):  # rotations of the weights and what enters them
        raise _refusal(place, f"{method} transform_config {content['transform_config']!r}")
    groups = _object(place, content, "config_groups", method)
    blocks, activations = set(), False
    for name in groups:
        group = _object(place, groups, name, method)
        _check_fields(place, group, _GROUP_FIELDS, f"{method} {name}")
        activations |= bool(group.get("input_activations"))
        weights = _object(place, group, "weights", method)
        if weights:
            blocks |= _group_blocks(place, weights, group.get("format") or content.get("format"))
    if len(blocks) > 1:
        raise _refusal(place, f"{method} groups with different blocks {sorted(blocks)}")
    block = next(iter(blocks), DEFAULT_BLOCK)
    return Quantization(method, block, block in blocks, activations)


def _group_blocks(place: str, weights: Mapping[str, Any], storage: Any) -> set[tuple[int, int]]:
    """The block of one group of compressed-tensors; none where its scales are of no blocks."""
    method = "compressed-tensors"
    _check_fields(place, weights, _WEIGHT_FIELDS, f"{method} weights")
    for name, value in (("symmetric", True), ("dynamic", False), ("actorder", None)):
        if weights.get(name) not in (value, None):
            raise _refusal(place, f"{method} weights with {name} {weights[name]!r}")
    kind, bits, strategy = (weights.get(name) for name in ("type", "num_bits", "strategy"))
    if storage not in _FLOAT_FORMATS or (kind, bits) != ("float", 8):
        raise _refusal(place, f"{method} format {storage!r} with {bits!r}-bit {kind!r} weights")
    if strategy not in ("tensor", "channel", "block"):
        raise _refusal(place, f"{method} weights with strategy {strategy!r}")
    return {_block(place, weights.get("block_structure"))} if strategy == "block" else set()


def _object(place: str, content: Mapping[str, Any], name: str, method: str) -> Mapping[str, Any]:
    """content[name], an object of fields; {} where it is missing or empty."""
    value = content.get(name) or {}
    if not isinstance(value, Mapping):
        raise _refusal(place, f"{method} {name} {value!r}")
    return value


def _check_fields(place: str, content: Mapping[str, Any], known: set[str], method: str) -> None:
    """CheckpointError for a field that is not known and says something."""
    unknown = sorted(
        str(name)
        for name, value in content.items()
        if name not in known and name != "quant_method" and value not in (None, False, "", [], {})
    )
    if unknown:
        raise _refusal(
            place, f"{method} with the unknown field {unknown[0]!r}", f"remove {unknown[0]!r} there"
        )


def _refusal(place: str, declared: str, remedy: str | None = None) -> CheckpointError:
    remove = f", or {remedy} if it does not concern the weights" if remedy else ""
    return CheckpointError(
        f"{place} declares {declared[:500]}, which cannot be read. Give as target_path the "
        f"unquantized model that this one was made from (its model card names it; a head trained "
        f"on that one serves this one as well){remove}. Weights that are read quantized: fp8, "
        f"fbgemm_fp8, mxfp4, ModelOpt FP8, compressed-tensors with 8-bit floats"
    )
