"""Decodes many prompts on the mesh, some at a time, and measures the time.

Every call of the compiled function takes the same number of prompts, split over all devices. A
prompt's random key depends on its number alone, so that its reply does not depend on which prompts
are decoded beside it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from MaxDraft.decoding.acceptance import fold_in
from MaxDraft.decoding.generate import generate
from MaxDraft.decoding.state import DecodeParams, DecodeSpec, Reply
from MaxDraft.sharding import active_rules, constrain, partition_spec

# params, prompts int32 [B, P], their lengths int32 [B], their numbers int32 [B]
Decode = Callable[[DecodeParams, jax.Array, jax.Array, jax.Array], Reply]


@dataclasses.dataclass(frozen=True)
class DecodedPrompts:
    """The replies to all prompts, and what they cost."""

    replies: list[list[int]]
    seconds: float
    verify_steps: int  # the target's passes after the prompts, over all prompts
    accepted_drafts: np.ndarray  # int [gamma]: verify steps that accepted draft j

    @property
    def accept_length(self) -> float:
        """Tokens that verify steps added to replies / verify steps, pooled over all prompts.

        The first token of a reply comes from the prompt's own pass and is not counted. 0 where
        every reply ended with its first token.
        """
        emitted = sum(len(reply) - 1 for reply in self.replies)
        return emitted / self.verify_steps if self.verify_steps else 0.0

    @property
    def accept_length_engine(self) -> float:
        """(accepted drafts + 1) / verify steps, pooled over all prompts.

        Every verify step counts all drafts that it accepted and the target's own token, also those
        past a stop token or past max_new_tokens, which accept_length leaves out. So the logs of
        engines count: accept-len of sglang-jax and SGLang, 1 + accepted / drafts of vLLM. A drafter
        of gamma drafts that is always right reads gamma + 1, whatever the length of its replies.
        """
        if not self.verify_steps:
            return 0.0
        return (self.verify_steps + int(self.accepted_drafts.sum())) / self.verify_steps

    @property
    def accepted_by_draft_step(self) -> list[float]:
        """For every draft of the chain: verify steps that accepted it / verify steps."""
        return (self.accepted_drafts / max(self.verify_steps, 1)).tolist()

    @property
    def reply_tokens(self) -> int:
        return sum(len(reply) for reply in self.replies)

    @property
    def tokens_per_second(self) -> float:
        return self.reply_tokens / self.seconds


def compile_decode(spec: DecodeSpec) -> Decode:
    """generate() as one program, with the random keys made from the prompts' numbers."""

    def decode(params, prompts, lengths, numbers):
        keys = fold_in(jnp.broadcast_to(jax.random.key(0), numbers.shape), numbers)
        reply = generate(spec, params, prompts, lengths, keys)
        return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), reply)  # on every process

    return jax.jit(decode)


def decode_prompts(
    decode: Decode, params: DecodeParams, prompts: Sequence[Sequence[int]], batch_size: int
) -> DecodedPrompts:
    """Decodes all prompts, `batch_size` in a call; the time leaves out compiling."""
    batches = [tuple(map(_on_mesh, batch)) for batch in prompt_batches(prompts, batch_size)]
    jax.block_until_ready(decode(params, *batches[0]))  # compiles
    began = time.monotonic()
    replies = jax.block_until_ready([decode(params, *batch) for batch in batches])
    seconds = time.monotonic() - began
    reply = jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(replies))
    count = len(prompts)
    return DecodedPrompts(
        replies=[reply.tokens[row, : reply.length[row]].tolist() for row in range(count)],
        seconds=seconds,
        verify_steps=int(reply.verify_steps[:count].sum()),
        accepted_drafts=reply.accepted_drafts[:count].sum(0),
    )


def prompt_batches(
    prompts: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Prompts int32 [B, P], padded on the right, their lengths and their numbers int32 [B].

    All batches have one shape: the last prompt fills up the last batch, and its extra replies are
    left out of every count.
    """
    width = max(len(prompt) for prompt in prompts)
    for start in range(0, len(prompts), batch_size):
        numbers = np.minimum(np.arange(start, start + batch_size), len(prompts) - 1)
        tokens = np.zeros((batch_size, width), np.int32)
        for row, number in enumerate(numbers):
            tokens[row, : len(prompts[number])] = prompts[number]
        lengths = np.array([len(prompts[number]) for number in numbers], np.int32)
        yield tokens, lengths, numbers.astype(np.int32)


def _on_mesh(x: np.ndarray) -> jax.Array:
    """Rows of a batch, split over all devices of the active mesh."""
    active = active_rules()
    if active is None:
        return jnp.asarray(x)
    mesh, rules = active
    spec = partition_spec(("draft_batch", *(None,) * (x.ndim - 1)), rules)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
