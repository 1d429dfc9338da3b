"""Real speculative decoding of held-out prompts, measured against plain decoding.

accept_length   tokens emitted by verify steps / verify steps, pooled over all prompts; the first
                token of a reply comes from the prompt's own pass and is in neither count
lossless        every greedy reply equals the target's plain greedy reply, token for token
speedup         tokens per second, speculative / plain, same prompts, same run
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft.decoding.generate import Reply, TargetModel, decode_plain
from MaxDraft.decoding.speculative import DraftModel, decode_speculative
from MaxDraft.layers.params import Tree
from MaxDraft.targets import decoder


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """How prompts are decoded."""

    draft_steps: int
    max_new_tokens: int
    temperature: float  # of the sampled pass; 0: none
    batch_size: int
    stop_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One way of decoding all prompts."""

    replies: list[list[int]]
    seconds: float
    verify_steps: int
    accepted: np.ndarray  # int [N]: accepted drafts by chain step

    @property
    def accept_length(self) -> float:
        """Tokens emitted / verify steps; 0 where every reply ended with its first token."""
        emitted = sum(len(reply) - 1 for reply in self.replies)
        return emitted / self.verify_steps if self.verify_steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return sum(len(reply) for reply in self.replies) / self.seconds


def measure(
    target: TargetModel,
    head: DraftModel,
    target_params: Tree,
    head_params: Tree,
    untrained_params: Tree,
    draft_to_target: jax.Array,
    prompts: Sequence[Sequence[int]],
    settings: DecodeSettings,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Decodes every prompt plainly and speculatively -> the decoding part of evaluation.json."""
    plain = functools.partial(
        decode_plain, target, max_new_tokens=settings.max_new_tokens, stop_ids=settings.stop_ids
    )
    chain = functools.partial(
        decode_speculative,
        target,
        head,
        draft_steps=settings.draft_steps,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=settings.stop_ids,
    )

    def run(name: str, decode: Callable[..., Reply], *args) -> Pass:
        log(f"decoding {len(prompts)} held-out prompts: {name}")
        return _run(decode, args, prompts, settings.batch_size)

    greedy_chain = jax.jit(functools.partial(chain, temperature=0.0))
    greedy = run("plain, greedy", jax.jit(functools.partial(plain, temperature=0.0)), target_params)
    drafted = run("speculative, greedy", greedy_chain, target_params, head_params, draft_to_target)
    untrained = run(
        "speculative, greedy, an untrained head",
        greedy_chain,
        target_params,
        untrained_params,
        draft_to_target,
    )
    unequal = [
        _first_difference(target, target_params, i, prompts[i], reply, drafted.replies[i])
        for i, reply in enumerate(greedy.replies)
        if reply != drafted.replies[i]
    ]
    result = {
        "accept_length": drafted.accept_length,
        "accept_length_untrained": untrained.accept_length,
        "accepted_by_draft_step": (drafted.accepted / max(drafted.verify_steps, 1)).tolist(),
        "lossless": not unequal,
        "unequal_replies": unequal,
        "tokens_per_second": {
            "plain": greedy.tokens_per_second,
            "speculative": drafted.tokens_per_second,
        },
        "speedup": drafted.tokens_per_second / greedy.tokens_per_second,
        "distinct_4gram_share": distinct_ngram_share(greedy.replies, 4),
        "distinct_4gram_share_of_all_replies": distinct_ngram_share(
            [list(itertools.chain(*greedy.replies))], 4
        ),
        "prompts": len(prompts),
        "reply_tokens": sum(len(reply) for reply in greedy.replies),
        "verify_steps": drafted.verify_steps,
    }
    if settings.temperature > 0:
        sampled = run(
            f"speculative, temperature {settings.temperature:g}",
            jax.jit(functools.partial(chain, temperature=settings.temperature)),
            target_params,
            head_params,
            draft_to_target,
        )
        result["sampled"] = {
            "temperature": settings.temperature,
            "accept_length": sampled.accept_length,
            "reply_tokens": sum(len(reply) for reply in sampled.replies),
        }
    return result


def distinct_ngram_share(replies: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams / n-grams, counted inside each reply and pooled; 1.0: nothing repeats."""
    distinct = total = 0
    for reply in replies:
        grams = [tuple(reply[i : i + n]) for i in range(len(reply) - n + 1)]
        distinct, total = distinct + len(set(grams)), total + len(grams)
    return distinct / total if total else 1.0


def _first_difference(
    target: TargetModel,
    params: Tree,
    number: int,
    prompt: Sequence[int],
    plain: Sequence[int],
    drafted: Sequence[int],
) -> dict[str, Any]:
    """Where two greedy replies part, and by how much the target prefers the plain one's token.

    A gap of the size of a rounding error is a tie that the wider verify pass rounded the other way;
    a larger one would be a mistake in the decoding.
    """
    together = zip(plain, drafted, strict=False)
    at = next((i for i, (a, b) in enumerate(together) if a != b), min(len(plain), len(drafted)))
    difference = {"prompt": number, "token": at}
    if at < min(len(plain), len(drafted)):
        text = jnp.asarray([*prompt, *plain[:at]], jnp.int32)[None]
        cache = target.empty_cache(1, text.shape[1])
        slots = jnp.arange(text.shape[1])[None]
        _, last, _ = jax.jit(target.extend)(params, cache, text, slots)
        logits = decoder.logits(params, target.dims, last[0, -1])
        difference["logit_gap"] = float(logits[plain[at]] - logits[drafted[at]])
    return difference


def _run(
    decode: Callable[..., Reply],
    args: tuple,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
) -> Pass:
    width = max(len(prompt) for prompt in prompts)
    batches = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        chunk += [chunk[-1]] * (batch_size - len(chunk))  # one shape; the extra replies are cut
        tokens = np.zeros((batch_size, width), np.int32)
        for row, prompt in enumerate(chunk):
            tokens[row, : len(prompt)] = prompt
        batches.append((tokens, np.array([len(prompt) for prompt in chunk], np.int32)))

    jax.block_until_ready(decode(*args, *batches[0], jax.random.key(0)))  # compile
    began = time.monotonic()
    found = [
        decode(*args, tokens, lengths, jax.random.fold_in(jax.random.key(0), number))
        for number, (tokens, lengths) in enumerate(batches)
    ]
    found = jax.device_get(jax.block_until_ready(found))
    seconds = time.monotonic() - began
    replies, verify_steps, accepted = [], 0, 0
    for number, reply in enumerate(found):
        real = min(batch_size, len(prompts) - number * batch_size)
        for row in range(real):
            replies.append(reply.tokens[row, : reply.length[row]].tolist())
        verify_steps += int(reply.verify_steps[:real].sum())
        accepted = accepted + reply.accepted[:real].sum(0)
    return Pass(replies, seconds, verify_steps, accepted)
