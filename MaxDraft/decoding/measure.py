"""Real speculative decoding of held-out prompts, measured against plain decoding.

accept_length         tokens that verify steps added to replies / verify steps, all prompts pooled
accept_length_engine  (accepted drafts + 1) / verify steps: the drafts that were accepted past the
                      end of a reply count too, as in the logs of engines (see prompts.py)
lossless              every greedy reply equals the target's plain greedy reply, token for token
speedup               tokens per second, speculative / plain, same prompts, same run
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from MaxDraft.decoding.prompts import DecodedPrompts, compile_decode, decode_prompts
from MaxDraft.decoding.state import DecodeParams, DecodeSpec
from MaxDraft.decoding.target_model import CachedContext, TargetModel
from MaxDraft.layers.params import Tree
from MaxDraft.sharding import constrain, num_shards
from MaxDraft.targets import decoder


def measure(
    spec: DecodeSpec,
    params: DecodeParams,
    untrained: Tree,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Decodes every prompt plainly and speculatively -> the decoding part of evaluation.json.

    spec: its temperature is that of a second, sampled pass beside the greedy one; 0: greedy only.
    untrained: a drafter's initial parameters, for comparison.
    batch_size: prompts of one call, a multiple of the devices.
    """

    def run(name: str, decode, params: DecodeParams) -> DecodedPrompts:
        log(f"decoding {len(prompts)} held-out prompts: {name}")
        return decode_prompts(decode, params, prompts, batch_size)

    greedy_spec = dataclasses.replace(spec, temperature=0.0)
    plain = run("plain, greedy", compile_decode(greedy_spec.without_drafts()), params)
    decode = compile_decode(greedy_spec)
    greedy = run("speculative, greedy", decode, params)
    baseline = run(
        "speculative, greedy, an untrained head",
        decode,
        dataclasses.replace(params, drafter=untrained),
    )
    unequal = [
        first_difference(spec, params, number, prompts[number], ours, theirs)
        for number, (ours, theirs) in enumerate(zip(plain.replies, greedy.replies, strict=True))
        if ours != theirs
    ]
    result = comparison(plain, greedy, baseline) | {
        "lossless": not unequal,
        "unequal_replies": unequal,
    }
    if spec.temperature > 0:
        name = f"speculative, temperature {spec.temperature:g}"
        sampled = run(name, compile_decode(spec), params)
        result["sampled"] = {
            "temperature": spec.temperature,
            "accept_length": sampled.accept_length,
            "accept_length_engine": sampled.accept_length_engine,
            "reply_tokens": sampled.reply_tokens,
        }
    return result


def comparison(
    plain: DecodedPrompts, greedy: DecodedPrompts, untrained: DecodedPrompts
) -> dict[str, Any]:
    """The numbers of plain decoding, of the drafter, and of an untrained drafter beside it."""
    return {
        "accept_length": greedy.accept_length,
        "accept_length_engine": greedy.accept_length_engine,
        "accept_length_untrained": untrained.accept_length,
        "accepted_by_draft_step": greedy.accepted_by_draft_step,
        "tokens_per_second": {
            "plain": plain.tokens_per_second,
            "speculative": greedy.tokens_per_second,
        },
        "speedup": greedy.tokens_per_second / plain.tokens_per_second,
        "distinct_4gram_share": distinct_ngram_share(plain.replies, 4),
        "distinct_4gram_share_of_all_replies": distinct_ngram_share(
            [list(itertools.chain(*plain.replies))], 4
        ),
        "prompts": len(plain.replies),
        "reply_tokens": plain.reply_tokens,
        "verify_steps": greedy.verify_steps,
    }


def distinct_ngram_share(replies: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams / n-grams, counted inside each reply and pooled; 1.0: nothing repeats."""
    distinct = total = 0
    for reply in replies:
        grams = [tuple(reply[i : i + n]) for i in range(len(reply) - n + 1)]
        distinct, total = distinct + len(set(grams)), total + len(grams)
    return distinct / total if total else 1.0


def first_difference(
    spec: DecodeSpec,
    params: DecodeParams,
    number: int,
    prompt: Sequence[int],
    plain: Sequence[int],
    drafted: Sequence[int],
) -> dict[str, Any]:
    """Where two greedy replies part, and by how much the target prefers the plain one's token.

    A gap of the size of a rounding error is a tie that the wider verify pass rounded the other way;
    a larger one would be a mistake in the decoding. Without a gap, one reply is longer.
    """
    shorter = min(len(plain), len(drafted))
    at = next((i for i in range(shorter) if plain[i] != drafted[i]), shorter)
    difference = {"prompt": number, "token": at}
    if at < shorter:
        text = np.array([*prompt, *plain[:at]], np.int32)
        gap = jax.jit(functools.partial(_logit_gap, spec.target))
        difference["logit_gap"] = float(gap(params.target, text, plain[at], drafted[at]))
    return difference


def _logit_gap(
    target: TargetModel, params: Tree, text: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
    """The logit of token a less that of token b after text int32 [S]."""
    tokens = jnp.tile(text, (num_shards("draft_batch"), 1))  # a batch that divides over the devices
    positions = jnp.broadcast_to(jnp.arange(len(text)), tokens.shape)
    context = CachedContext.from_chain(positions, len(text))
    cache = target.empty_cache(*tokens.shape)
    _, last_hidden_state, _ = target.extend(params, cache, tokens, context)
    logits = decoder.logits(params, target.dims, last_hidden_state[0, -1])
    return constrain(logits[a] - logits[b])
