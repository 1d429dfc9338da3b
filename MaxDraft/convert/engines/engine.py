"""What is known of a serving engine, and what it means for one drafter and its target.

An engine that cannot serve a drafter seldom says so: wrong hidden states, an ignored flag or a lost
rope scaling show only as an accept length near 1. So the answer is "yes" only with evidence, which
names the engine's version and the file that was read or the run that was made; "no" with the
reason; and "not known" otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from MaxDraft.drafts.drafter import Drafter

STEPS = 3  # drafts of a chain in the launch lines
NUM_CHIPS = "$NUM_CHIPS"  # in the launch lines: the devices that serve


@dataclasses.dataclass(frozen=True)
class ServedPair:
    """An exported drafter and its target."""

    drafter: Drafter
    captured_layers: tuple[int, ...]  # 0-based target layers whose outputs the drafter reads
    drafter_config: Mapping[str, Any]  # config.json of the export
    target_config: Mapping[str, Any]  # the target's language model
    target_path: Path
    export_path: Path

    @property
    def family(self) -> str:
        """The target's model_type."""
        return str(self.target_config.get("model_type"))

    @property
    def has_tied_embeddings(self) -> bool:
        """Whether the target's LM head is its embedding."""
        return bool(self.target_config.get("tie_word_embeddings"))

    @property
    def captures_default_layers(self) -> bool:
        """Whether the captured layers are those that an engine takes where nobody names any."""
        num_layers = self.target_config["num_hidden_layers"]
        return self.captured_layers == self.drafter.captured_layers((), num_layers)

    @property
    def flags(self) -> frozenset[str]:
        """Switches of the drafter that an engine must read, e.g. fc_norm."""
        return self.drafter.checkpoint_format.flags(self.drafter.dims)


@dataclasses.dataclass(frozen=True)
class Engine:
    """One engine at the version that was looked at."""

    name: str
    version: str
    # Target model_type -> evidence that its hidden states can be captured.
    families: Mapping[str, str]
    # Target model_type -> why it cannot be served, None where that is not known. The key None
    # stands for every family that is named nowhere.
    refused_families: Mapping[str | None, str | None]
    # Kind of drafter -> {flag: evidence that it is read}; "" is the drafter without flags.
    drafters: Mapping[str, Mapping[str, str]]
    launch_line: Callable[[ServedPair], str]
    problems: Callable[[ServedPair], Sequence[str]] = lambda _: ()  # reasons for "no"
    limits: Callable[[ServedPair], Sequence[str]] = lambda _: ()  # what to know before it is tried
    reads_unknown_flags: bool = False  # False: a flag without evidence is ignored without a word

    def verdict(self, pair: ServedPair) -> Verdict:
        """What this engine makes of a drafter and its target."""
        problems = [*self._drafter_problems(pair), *self.problems(pair)]
        reason = self.refused_families.get(pair.family, self.refused_families.get(None))
        if pair.family not in self.families and reason:
            problems.append(f"'{pair.family}' targets: {reason}")
        if problems:
            return Verdict("no", problems)
        unknown = self._unknown(pair)
        if unknown:
            return Verdict("not known", [*unknown, *self.limits(pair)], self.launch_line(pair))
        evidence = [self.families[pair.family]]
        evidence += [self.drafters[pair.drafter.kind][flag] for flag in ("", *sorted(pair.flags))]
        reasons = [f"evidence: {text}" for text in dict.fromkeys(evidence)]
        return Verdict("yes", [*reasons, *self.limits(pair)], self.launch_line(pair))

    def _drafter_problems(self, pair: ServedPair) -> list[str]:
        if pair.drafter.kind not in self.drafters:
            return [f"reads no drafter of kind {pair.drafter.kind}"]
        if self.reads_unknown_flags:
            return []
        return [
            f"ignores {flag} without a word, and then computes something else: the accept length "
            f"would be about 1"
            for flag in sorted(pair.flags - self.drafters[pair.drafter.kind].keys())
        ]

    def _unknown(self, pair: ServedPair) -> list[str]:
        unknown = []
        if pair.family not in self.families:
            unknown.append(
                f"whether it captures hidden states of '{pair.family}' targets has not been tried"
            )
        read = self.drafters[pair.drafter.kind]
        unknown += [f"whether it reads {flag}" for flag in sorted(pair.flags - read.keys())]
        return unknown


@dataclasses.dataclass(frozen=True)
class Verdict:
    """yes, no or not known, with reasons; the launch line where it may be worth trying."""

    answer: str
    reasons: list[str]
    launch_line: str | None = None
