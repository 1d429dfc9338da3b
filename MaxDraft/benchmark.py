"""Measures the training step of any model file on any mesh, with random weights and tokens.

    python3 MaxDraft/benchmark.py configs/base.yml model_name=llama3.1-8b per_device_batch_size=2
    python3 MaxDraft/benchmark.py configs/base.yml model_name=qwen3-8b --compile_only
    python3 MaxDraft/benchmark.py configs/base.yml model_name=qwen3-8b --compare ttt_length=5
    JAX_PLATFORMS=cpu python3 MaxDraft/benchmark.py configs/base.yml model_name=qwen3-8b \
        --topology v5e:2x4

The target's dimensions are the model file's target_config; no checkpoint, tokenizer or data is
read, and nothing but jax, optax and pyyaml imported.

    --tokens all      one document a row, all of it the assistant's: every row is judged (default)
             chats    packed conversations with ShareGPT's mean lengths
    --steps N         timed steps (10), after one that is not timed
    --compile_only    no weights and no step: bytes and FLOPs of the compiled program
    --topology NAME   compiles for devices that need not be there: a TPU slice (v5e:2x4, v5p:2x2x1,
                      v6e:2x2) or the GPUs of one host (h100:1, h200:8); where DEVICE=tpu or
                      DEVICE=cuda bash setup.sh has installed their compiler
    --compare "K=V .."  the same with these keys besides; steps alternate, so that their ratio
                      means something on a machine that does other work as well
    --profile FOLDER  a trace of two more steps, for TensorBoard or Perfetto
    --json FILE       writes all numbers
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # importing this file changes nothing
    # The repository's root, not this folder: no file in it may shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from MaxDraft.errors import exit_on_signals

    exit_on_signals()

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from MaxDraft import compile_step, pyconfig
from MaxDraft.compile_step import TrainingPrograms
from MaxDraft.cost import attention_pairs, compiled_flops, flops, traced_flops
from MaxDraft.drafts import alignment, losses, registry
from MaxDraft.errors import run_main
from MaxDraft.input_pipeline.synthetic import conversations, document_lengths, whole_rows
from MaxDraft.layers import params as parameters
from MaxDraft.layers.params import Tree
from MaxDraft.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from MaxDraft.pyconfig import Config, ConfigError
from MaxDraft.run.spec import drafter_options, make_mesh, step_spec
from MaxDraft.targets import registry as families
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.train_step import FrozenParams, StepSpec, TrainState

# What decides no shape and model files leave out where releases of a model differ.
UNSAID = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1 << 20,
    "query_pre_attn_scalar": 256,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}

# bfloat16 products of matrices, FLOP/s of one device (jax's device_kind: the vendor's data sheet).
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

# What XLA asks of a GPU to compile for it (xla/backends/gpu/target_config/specs, H100 SXM). An H200
# is that processor with more memory, in bytes.
GPU_MEMORY = {"h100": 84_929_347_584, "h200": 150_000_000_000}
HOPPER = """
platform_name: "CUDA"
device_description_str: "NVIDIA Hopper"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  device_memory_size: %d
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


@dataclasses.dataclass
class Setting:
    """One configuration, compiled."""

    name: str
    config: Config
    target: DecoderDims
    spec: StepSpec
    programs: TrainingPrograms
    table: Tree  # of the target's parameters
    mesh: jax.sharding.Mesh
    tokens: dict[str, np.ndarray]  # [A, B, T]
    tokens_kind: str  # of --tokens
    judged: np.ndarray  # bool [A, B, T]
    compiled: Any = None
    said: dict[str, Any] = dataclasses.field(default_factory=dict)

    def precision(self):
        """Context in which its programs are traced."""
        return jax.default_matmul_precision(self.config.matmul_precision)


# ---------------------------------------------------------------------------------------- settings
def open_setting(
    name: str, config: Config, tokens: str, devices: Sequence[jax.Device] | None = None
) -> Setting:
    """Dimensions, mesh and programs of a configuration; nothing is compiled yet."""
    target = target_dims(config)
    kind = registry.drafter_class(config.drafter)
    drafter = kind.from_options(drafter_options(config), target)
    captured_layers = kind.captured_layers(config.target_layer_ids, target.num_layers)
    mesh = make_mesh(config, devices)
    spec = step_spec(config, target, captured_layers, drafter, mesh)
    settings = OptimizerConfig.from_config(config)
    schedule = learning_rate_schedule(settings, 1000)
    optimizer = make_optimizer(settings, schedule, drafter.params_table())
    rows = config.gradient_accumulation_steps, config.per_device_batch_size * mesh.size
    make = whole_rows if tokens == "all" else conversations
    drawn = make(*rows, config.max_target_length, target.vocab_size)
    return Setting(
        name=name,
        config=config,
        target=target,
        spec=spec,
        programs=compile_step.training_programs(
            spec, optimizer, schedule, config.init_weights_seed
        ),
        table=spec.source.params_table(),
        mesh=mesh,
        tokens=drawn,
        tokens_kind=tokens,
        judged=judged_rows(config, drawn),
    )


def judged_rows(config: Config, tokens: dict[str, np.ndarray]) -> np.ndarray:
    """bool [A, B, T]: rows that some step of the rollout judges; ConfigError if there is none."""
    turns, segments = (
        jnp.asarray(tokens[name].reshape(-1, config.max_target_length))
        for name in ("turn_ids", "segment_ids")
    )
    aligned = alignment.loss_mask(turns, segments, config.ttt_length, config.loss_alignment)
    judged = np.asarray(aligned.any(0)).reshape(tokens["tokens"].shape)
    if not judged.any():
        raise ConfigError(
            f"no row of these tokens is judged: max_target_length={config.max_target_length} is "
            f"too short for them"
        )
    return judged


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Those of a TPU slice or of a host with GPUs, which need not be there."""
    kind, _, count = topology.partition(":")
    if kind in GPU_MEMORY:
        platform = "cuda"
        given = {"target_config": HOPPER % GPU_MEMORY[kind], "topology": f"1x1x{count}"}
    else:
        platform = "tpu"
        given = {"chips_per_host_bounds": (1, 1, 1)} if count == "1x1" else {}
    try:
        return topologies.get_topology_desc(topology, platform, **given).devices
    except Exception as error:  # of several types, as it is not known, or no compiler is there
        raise ConfigError(
            f"--topology {topology}: {str(error).splitlines()[0]}\n(it takes the compiler that "
            f"DEVICE={platform} bash setup.sh installs, and a name like v5e:1x1, v5e:2x4 or h100:8)"
        ) from error


def target_dims(config: Config) -> DecoderDims:
    """Dimensions of the target that a model file was written for."""
    fields = dict(config.target_config)
    if not fields:
        raise ConfigError(
            f"model_name={config.model_name} has no target_config; name a model of "
            f"configs/models/ that has one, or give target_config='{{model_type: ..., ...}}'"
        )
    return families.dims_from_config(UNSAID | _layer_kinds(fields) | fields)


def _layer_kinds(fields: dict[str, Any]) -> dict[str, Any]:
    """gpt-oss alternates; its model files do not say it again for every layer."""
    if fields.get("model_type") != "gpt_oss":
        return {}
    kinds = ["sliding_attention", "full_attention"] * fields["num_hidden_layers"]
    return {"layer_types": kinds[: fields["num_hidden_layers"]]}


# ------------------------------------------------------------------------------------- what it does
def compile_setting(setting: Setting) -> tuple[TrainState, FrozenParams, dict[str, Any]]:
    """Compiles the step from shapes alone; -> those shapes, of state, target and batch."""
    shapes = (
        setting.programs.abstract_state,
        compile_step.abstract_frozen(setting.spec, setting.table),
        compile_step.abstract_batch(setting.spec, *setting.tokens["tokens"].shape),
    )
    start = time.perf_counter()
    with setting.precision():
        setting.compiled = setting.programs.train.lower(*shapes).compile()
    memory = setting.compiled.memory_analysis()
    setting.said |= {
        "compile_seconds": time.perf_counter() - start,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    return shapes


def describe(setting: Setting, shapes: tuple[Any, ...]) -> None:
    """Counts tokens, rows and FLOPs of a step."""
    config, mesh, batch = setting.config, setting.mesh, setting.tokens
    judged = setting.judged
    # A device has its part of every micro-batch, and rounds its judged rows up to a block.
    A, B, T = judged.shape
    of_device = judged.reshape(A, mesh.size, -1).sum((0, 2))
    block = min(config.rollout_block_size, A * B * T // mesh.size)
    rules = dict(config.logical_axis_rules)
    target_shares = math.prod(mesh.shape[axis] for axis in rules["target_batch"])
    real = batch["segment_ids"] > 0
    lengths = document_lengths(batch["segment_ids"])
    per_token = flops.per_token(
        setting.target,
        setting.spec.drafter,
        config.ttt_length,
        float((lengths**2).sum() / lengths.sum()),  # a token's document, on average
        float(judged.sum() / real.sum()),
    )
    parts = {name: float(value * real.sum()) for name, value in per_token.items()}
    platform = mesh.devices.flat[0].platform
    platform = {"gpu": "cuda"}.get(platform, platform)
    setting.said |= {
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": dict(mesh.shape),
        "weights": config.weight_dtype
        + (
            " (keep_quantized is not measured)"
            if config.target_quantization == "keep_quantized"
            else ""
        ),
        "positions": real.size,
        "tokens": int(real.sum()),
        "tokens_kind": setting.tokens_kind,
        "judged_rows": int(judged.sum()),
        "computed_rows": int((-(-of_device // block) * block).sum()),
        "model_flops": parts,
        "traced_flops": traced_flops.count(setting.programs.train, *shapes, platform=platform),
    }
    if config.attention == "blockwise":  # kernels choose blocks of their own
        setting.said |= attention_pairs.computed_by_seen(
            batch["segment_ids"],
            judged,
            rollout_block=config.rollout_block_size,
            attention_block=config.attention_block_size,
            devices=mesh.size,
            target_shares=target_shares,
        )
    if platform == "cpu":  # XLA's text is read as a CPU's has it
        setting.said["compiled_flops"] = mesh.size * compiled_flops.count(
            setting.compiled.as_text()
        )


# -------------------------------------------------------------------------------------- how long
class Running:
    """A setting with weights on the devices, a step at a time."""

    def __init__(self, setting: Setting, shapes: tuple[Any, ...], other: Running | None = None):
        """other: one whose target is taken where it has the same shapes and places."""
        _, frozen, batch = shapes
        self.setting, self.shapes = setting, frozen
        if other is not None and _same(other.shapes, frozen):
            self.frozen = other.frozen
        else:
            places = jax.tree.map(lambda x: x.sharding, frozen.source)
            draw = jax.jit(lambda: parameters.initialize(setting.table, 0), out_shardings=places)
            ids = frozen.draft_to_target
            ids = jax.device_put(np.arange(len(ids), dtype=np.int32), ids.sharding)
            self.frozen = FrozenParams(draw(), ids)
        self.batch = {
            name: jax.device_put(x, batch[name].sharding) for name, x in setting.tokens.items()
        }
        self.state = setting.programs.initialize(None)

    def step(self) -> float:
        """One step -> seconds."""
        start = time.perf_counter()
        self.state, said = self.setting.compiled(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, said))
        seconds = time.perf_counter() - start
        if not said["finite"]:
            raise ConfigError(f"{self.setting.name}: the step's numbers are not finite")
        return seconds

    def breakdown(self, repeats: int) -> dict[str, float]:
        """Median seconds of the parts, each run alone as a program of its own."""
        parts, params = self.setting.programs, self.state.params
        outputs = parts.target(self.frozen, self.batch)
        loss, gradient, _ = parts.draft(params, self.frozen, self.batch, outputs)
        times = {
            "target": _median(lambda: parts.target(self.frozen, self.batch), repeats),
            "rollout and loss": _median(
                lambda: parts.draft(params, self.frozen, self.batch, outputs), repeats
            ),
        }

        def update():
            self.state, said = parts.update(self.state, loss, gradient)
            return said

        times["optimizer"] = _median(update, repeats)
        times["loss"] = _median(*self._loss(), repeats)
        times["rollout"] = times.pop("rollout and loss") - times["loss"]
        return {name: times[name] for name in ("target", "rollout", "loss", "optimizer")}

    def _loss(self) -> tuple[Callable, ...]:
        """The loss alone, of as many rows as one device has, with its gradients."""
        config, spec = self.setting.config, self.setting.spec
        K, H = spec.num_steps, self.setting.target.hidden_size
        D = spec.drafter.draft_vocab_size
        said = self.setting.said
        R = min(config.rollout_block_size, said["computed_rows"] // self.setting.mesh.size)
        blocks = said["computed_rows"] // self.setting.mesh.size // R
        dtype = jnp.dtype(config.dtype)

        def run(hidden, weight, teacher):
            teacher_head = weight.astype(dtype)

            def of_block(i, carry):
                hidden, d_weight = carry

                def loss(hidden):
                    logits = jnp.matmul(teacher, teacher_head, preferred_element_type=jnp.float32)
                    log_norm = jax.nn.logsumexp(logits, -1) + 1
                    judge = losses.TeacherTargets.from_logits(
                        logits, log_norm, jnp.zeros(len(teacher), jnp.int32)
                    )
                    weights = jnp.full((K, R), 1.0 / R)
                    total, _, new = losses.fused_linear_cross_entropy(
                        hidden, weight, d_weight, judge, weights, config.loss
                    )
                    return total, new

                d_hidden, d_weight = jax.grad(loss, has_aux=True)(hidden)
                return hidden + 1e-3 * d_hidden, d_weight

            carry = hidden, jnp.zeros_like(weight)
            return jax.lax.fori_loop(0, blocks, of_block, carry)

        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (K, R, H), dtype)
        weight = jax.random.normal(keys[1], (H, D), jnp.float32) * H**-0.5
        teacher = jax.random.normal(keys[2], (R + K - 1, H), dtype)
        compiled = jax.jit(run)
        return (lambda: compiled(hidden, weight, teacher),)


def _same(shapes: Tree, others: Tree) -> bool:
    return jax.tree.structure(shapes) == jax.tree.structure(others) and all(
        a == b for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(others), strict=True)
    )


def _median(function: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matmul_peak(dtype: Any) -> float:
    """FLOP/s that one device reaches in products of square matrices."""
    size, count = (1024, 4) if jax.devices()[0].platform == "cpu" else (8192, 16)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype) * size**-0.5

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, count, lambda _, y: jnp.matmul(y, x), x)

    return count * 2 * size**3 / min(_median(lambda: products(x), 3) for _ in range(3))


# ---------------------------------------------------------------------------------------- telling
def table(setting: Setting) -> str:
    """What was measured, for people."""
    said = setting.said
    model = sum(said["model_flops"].values())
    lines = [
        f"{setting.name}",
        f"  devices          {said['devices']}, "
        + ", ".join(f"{axis} {size}" for axis, size in said["mesh"].items()),
        f"  tokens           {said['tokens']:,} of {said['positions']:,} positions "
        f"({said['tokens'] / said['positions']:.1%})",
        f"  rows             {said['judged_rows']:,} judged, {said['computed_rows']:,} computed "
        f"({said['computed_rows'] / max(said['judged_rows'], 1):.3f} x)",
        f"  weights          {said['weights']}",
        f"  compile          {said['compile_seconds']:.1f} s",
        f"  bytes            {said['temporary_bytes'] / 2**20:,.0f} MiB temporary, "
        f"{said['argument_bytes'] / 2**20:,.0f} MiB arguments, a device",
        f"  model FLOPs      {model / 1e9:,.1f} GFLOP a step",
    ]
    lines += [
        f"    {name:<19}{value / 1e9:>12,.2f}  {value / model:6.1%}"
        for name, value in said["model_flops"].items()
    ]
    for name in ("traced", "compiled"):
        if f"{name}_flops" in said:
            flop = said[f"{name}_flops"]
            lines.append(
                f"  {name + ' FLOPs':<17}{flop / 1e9:,.1f} GFLOP on all devices, "
                + (
                    f"{flop / model:.3f} x the model's"
                    if said["tokens_kind"] == "all"
                    else "if rows were one document and all judged"
                )
            )
    if "target_pairs" in said:
        lines.append(
            f"  attention        pairs of row and key computed / seen: target "
            f"{said['target_pairs']:.3f}, rollout {said['rollout_pairs']:.3f}"
        )
    if "step_seconds" in said:
        low, median, high = said["step_seconds"]
        lines.append(
            f"  step             {median:.3f} s median, quartiles {low:.3f} to {high:.3f}, "
            f"{said['tokens_per_second_per_device']:,.0f} tokens/s/device"
        )
        lines.append(
            f"  MFU              {said['mfu_of_measured']:.1%} of {said['matmul_peak'] / 1e12:.3g} "
            f"TFLOP/s that a product reaches"
            + (f", {said['mfu']:.1%} of the data sheet" if "mfu" in said else "")
        )
        whole = sum(said["breakdown"].values())
        lines += [
            f"    {name:<19}{seconds:>10.3f} s  {seconds / whole:6.1%}"
            for name, seconds in said["breakdown"].items()
        ]
    return "\n".join(lines)


def measure(
    settings: list[Setting], shapes: list[tuple[Any, ...]], steps: int, profile: str = ""
) -> list[float]:
    """Times the settings' steps in turn; -> seconds of each pair's second by its first."""
    running: list[Running] = []
    for setting, of_setting in zip(settings, shapes, strict=True):
        running.append(Running(setting, of_setting, running[0] if running else None))
    for one in running:
        one.step()
    times = np.array([[one.step() for one in running] for _ in range(steps)])
    if profile:
        with jax.profiler.trace(profile):
            for one in 2 * running:
                one.step()
    for one, seconds in zip(running, times.T, strict=True):
        said = one.setting.said
        with one.setting.precision():
            peak = matmul_peak(jnp.dtype(one.setting.config.dtype))
        median = float(np.median(seconds))
        rate = sum(said["model_flops"].values()) / median / one.setting.mesh.size
        said |= {
            "step_seconds": [float(x) for x in np.quantile(seconds, (0.25, 0.5, 0.75))],
            "tokens_per_second_per_device": said["tokens"] / median / one.setting.mesh.size,
            "matmul_peak": peak,
            "mfu_of_measured": rate / peak,
        }
        with one.setting.precision():
            said["breakdown"] = one.breakdown(max(3, steps // 2))
        kind = one.setting.mesh.devices.flat[0].device_kind
        if kind in PEAK and one.setting.config.dtype == "bfloat16":
            said["mfu"] = rate / PEAK[kind]
    return (times[:, -1] / times[:, 0]).tolist()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmark.py", allow_abbrev=False)
    parser.add_argument("--tokens", choices=("all", "chats"), default="all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile_only", action="store_true")
    parser.add_argument("--topology", default="")
    parser.add_argument("--compare", type=shlex.split)
    parser.add_argument("--json", default="")
    parser.add_argument("--profile", default="")
    flags, keys = parser.parse_known_args(argv[1:])
    if flags.steps < 1:
        parser.error("--steps must be 1 or more")
    if flags.json and not Path(flags.json).absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {Path(flags.json).absolute().parent}")
    if flags.json and Path(flags.json).is_dir():
        parser.error(f"--json: {flags.json} is a folder; name a file")
    if flags.profile and Path(flags.profile).is_file():
        parser.error(f"--profile: {flags.profile} is a file; name a folder")
    if flags.compare == []:
        parser.error("--compare: give the keys that the second setting has besides")
    compile_only = flags.compile_only or bool(flags.topology)
    if compile_only and flags.profile:
        parser.error("--profile: nothing is run where a step is only compiled")
    devices = devices_of(flags.topology) if flags.topology else None
    variants = [keys]
    if flags.compare:
        replaced = {other.split("=")[0] for other in flags.compare}
        variants.append([*(k for k in keys if k.split("=")[0] not in replaced), *flags.compare])
    settings = [
        open_setting(
            " ".join(flags.compare if i else variant[1:]) or "defaults",
            pyconfig.initialize([argv[0], *variant], reads_files=False),
            flags.tokens,
            devices,
        )
        for i, variant in enumerate(variants)
    ]
    shapes = []
    for setting in settings:
        shapes.append(compile_setting(setting))
        describe(setting, shapes[-1])
    ratios = [] if compile_only else measure(settings, shapes, flags.steps, flags.profile)
    print("\n\n".join(table(setting) for setting in settings), flush=True)
    if len(settings) > 1 and ratios:
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(f"\nsecond / first: {median:.3f} median of pairs, quartiles {low:.3f} to {high:.3f}")
    if flags.json:
        result = [{"setting": setting.name} | setting.said for setting in settings]
        Path(flags.json).write_text(json.dumps({"settings": result, "ratios": ratios}, indent=2))
    return 0


if __name__ == "__main__":
    run_main(main)
