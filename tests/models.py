"""Small random targets and heads for tests."""

import types

import jax.numpy as jnp

from MaxDraft import compile_step
from MaxDraft.drafts.drafter import Drafter
from MaxDraft.drafts.eagle3 import head as eagle3
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.layers import params
from MaxDraft.layers.rope import Rope
from MaxDraft.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from MaxDraft.run.spec import step_spec
from MaxDraft.targets.dims import Attention, DecoderDims, Layer, Mlp
from MaxDraft.targets.table import decoder_params

ROPE = Rope(theta=10000.0, rotary_dim=8)
CAPTURE = (1, 2, 4)


def exact_power(theta: float) -> float:
    """rope_theta for transformers that it raises to powers exactly, then rounds to float32.

    torch's own float32 power is not always rounded correctly, and differs between processors.
    """
    import torch

    class ExactPower(float):
        def __pow__(self, exponents):
            return torch.tensor(float(self), dtype=torch.float64).pow(exponents.double()).float()

    return ExactPower(theta)


def llama(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope: Rope = ROPE,
) -> DecoderDims:
    """A Llama: every layer the same."""
    layer = Layer(Attention(num_heads, num_kv_heads, head_dim, rope), Mlp(intermediate_size))
    return DecoderDims(vocab_size, hidden_size, 1e-6, 256, (layer,) * num_layers)


def tiny_dims(vocab_size: int = 12) -> DecoderDims:
    return llama(vocab_size, 32, 48, 6, 4, 2, 8)


def tiny_head_dims(target: DecoderDims, draft_vocab_size: int) -> HeadDims:
    return HeadDims(
        hidden_size=target.hidden_size,
        intermediate_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        draft_vocab_size=draft_vocab_size,
        target_vocab_size=target.vocab_size,
        norm_eps=1e-6,
        rope=ROPE,
    )


def random_target(dims: DecoderDims, seed: int = 0):
    return params.initialize(decoder_params(dims, CAPTURE, jnp.float32), seed)


def random_head(dims: HeadDims, seed: int = 1):
    return params.initialize(eagle3.head_params(dims), seed)


def training_programs(config, target, head, mesh, total_steps=10, captured_layers=CAPTURE):
    """The step's programs as a run has them: TrainingPrograms' fields, evaluate, spec."""
    drafter = head if isinstance(head, Drafter) else Eagle3(head)
    spec = step_spec(config, target, captured_layers, drafter, mesh)
    settings = OptimizerConfig.from_config(config)
    schedule = learning_rate_schedule(settings, total_steps)
    optimizer = make_optimizer(settings, schedule, spec.drafter.params_table())
    programs = compile_step.training_programs(spec, optimizer, schedule, config.init_weights_seed)
    return types.SimpleNamespace(
        **vars(programs),
        evaluate=compile_step.evaluation_program(spec),
        batch_shardings=compile_step.batch_shardings(spec),
        spec=spec,
    )
