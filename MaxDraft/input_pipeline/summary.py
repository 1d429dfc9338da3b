"""What a run is about to learn from, in numbers that say what they are, and one decoded sample."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from MaxDraft.input_pipeline.dataset import Dataset, Documents
from MaxDraft.input_pipeline.packing import Rows
from MaxDraft.input_pipeline.template_sandbox import PINNED_TIME

OPEN, CLOSE = "⟦", "⟧"  # around what the assistant wrote


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of what the assistant wrote the draft vocabulary can write."""

    draft_vocab_size: int
    target_vocab_size: int
    share: float  # of the assistant tokens of the training conversations


@dataclasses.dataclass(frozen=True)
class Side:
    """The conversations of one side of the split, each counted once."""

    conversations: int
    tokens: int
    assistant_tokens: int
    truncated: int  # conversations

    @property
    def assistant_share(self) -> float:
        """Of the tokens."""
        return self.assistant_tokens / self.tokens

    @classmethod
    def from_documents(cls, documents: Documents) -> Side:
        return cls(
            len(documents),
            int(documents.lengths.sum()),
            int(documents.assistant_lengths.sum()),
            documents.num_cut,
        )


@dataclasses.dataclass(frozen=True)
class Summary:
    """See `text` for what each number counts."""

    records_read: int
    records_skipped: int
    skipped: tuple[str, ...]  # a line for each reason
    changed: tuple[str, ...]  # records used in part, a line for each reason
    ignored_fields: dict[str, int]  # fields that are not read -> records that have them
    replies: int
    shortened_replies: int  # of which the chat template deletes a part
    template_date: str  # what the clocks of the chat template show
    left_out: dict[str, int]  # conversations, by reason
    train: Side
    held_out: Side
    max_target_length: int
    rows_first_epoch: int
    packing_efficiency: float  # real tokens / positions, over the rows of the first epoch
    coverage: Coverage | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        value = dataclasses.asdict(self)
        for side in ("train", "held_out"):
            value[side]["assistant_share"] = getattr(self, side).assistant_share
        return value

    def text(self) -> str:
        """A few lines for people."""
        share = self.records_skipped / self.records_read
        lines = [
            f"records read: {self.records_read}, of them skipped: {self.records_skipped} "
            f"({share:.2%} of the records)"
        ]
        lines += [f"  {reason}" for reason in self.skipped]
        lines += [f"used in part: {reason}" for reason in self.changed]
        if self.shortened_replies:
            lines.append(
                f"replies that the chat template shortens, not trained: {self.shortened_replies} "
                f"of {self.replies} ({self.shortened_replies / self.replies:.2%} of the replies)"
            )
        if self.ignored_fields:
            fields = (f"{name!r} ({count})" for name, count in self.ignored_fields.items())
            lines.append(f"fields that are not read (records that have them): {', '.join(fields)}")
        lines += [f"left out: {n} conversations, {reason}" for reason, n in self.left_out.items()]
        for name, side in (("train", self.train), ("held out", self.held_out)):
            lines.append(
                f"{name}: {side.conversations} conversations, {side.tokens} tokens, of them "
                f"{side.assistant_tokens} the assistant's ({side.assistant_share:.1%} of the "
                f"tokens); {side.truncated} conversations truncated to {self.max_target_length} "
                f"tokens ({side.truncated / side.conversations:.1%} of the conversations)"
            )
        lines.append(
            f"packing: {self.rows_first_epoch} rows of {self.max_target_length} positions in the "
            f"first epoch, {self.packing_efficiency:.1%} of the positions hold tokens"
        )
        if self.coverage:
            lines.append(
                f"draft vocabulary: {self.coverage.draft_vocab_size} of "
                f"{self.coverage.target_vocab_size} tokens; they are {self.coverage.share:.2%} of "
                f"the {self.train.assistant_tokens} assistant tokens to train on"
            )
        return "\n".join(lines)


def summarize(
    dataset: Dataset, rows: Rows, max_target_length: int, coverage: Coverage | None = None
) -> Summary:
    """rows: of the training run, as pack_epochs made them; efficiency is its first epoch's."""
    reports = [encoded.report for encoded in dataset.encoded]
    left_out, ignored_fields = Counter(), Counter()
    for encoded in dataset.encoded:
        left_out.update(encoded.left_out)
        ignored_fields.update(encoded.report.ignored_fields)
    if dataset.also_held_out:
        left_out["in the training files and in the eval files"] = dataset.also_held_out
    num_rows = rows.epoch_ends[0]
    real = int(dataset.train.lengths[rows.documents[: rows.offsets[num_rows]]].sum())
    return Summary(
        records_read=sum(report.records for report in reports),
        records_skipped=sum(report.skipped_records for report in reports),
        skipped=tuple(line for report in reports for line in report.skip_lines()),
        changed=tuple(line for report in reports for line in report.change_lines()),
        ignored_fields=dict(ignored_fields),
        replies=sum(report.replies for report in reports),
        shortened_replies=sum(report.shortened_replies for report in reports),
        template_date=PINNED_TIME.date().isoformat(),
        left_out=dict(left_out),
        train=Side.from_documents(dataset.train),
        held_out=Side.from_documents(dataset.held_out),
        max_target_length=max_target_length,
        rows_first_epoch=num_rows,
        packing_efficiency=real / (num_rows * max_target_length),
        coverage=coverage,
    )


def format_sample(
    tokens: np.ndarray,  # int [n]
    turn_ids: np.ndarray,  # int [n]
    decode: Callable[[Sequence[int]], str],
    max_tokens: int = 400,
) -> str:
    """The decoded text, every assistant turn between ⟦ and ⟧; its middle left out if it is long.

    Adjacent turns stand in brackets of their own.
    """
    if len(tokens) > max_tokens:
        half = max_tokens // 2
        head = format_sample(tokens[:half], turn_ids[:half], decode, max_tokens)
        tail = format_sample(tokens[-half:], turn_ids[-half:], decode, max_tokens)
        return f"{head}\n[... {len(tokens) - 2 * half} tokens ...]\n{tail}"
    cuts = np.flatnonzero(np.diff(turn_ids)) + 1
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        text = decode(tokens[start:end].tolist())
        parts.append(f"{OPEN}{text}{CLOSE}" if turn_ids[start] > 0 else text)
    return "".join(parts)
