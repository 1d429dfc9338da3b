"""What became of the records that were read: nothing is left out without being counted and named.

skipped          records that cannot be used
changed          records that are used in part, such as without a reply that nobody asked for
ignored_fields   fields that are not read, with the number of records that have them
replies          assistant turns, and those of which the chat template deletes a part
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from MaxDraft.input_pipeline.errors import DataError

EXAMPLES_KEPT = 3  # of each reason
REASONS_KEPT = 20  # a template's own message may differ from record to record
REASON_LENGTH = 300  # characters; a template may put a whole message into its own
FIELDS_KEPT = 40  # names of ignored fields; a record may use its keys as data
FIELD_LENGTH = 60  # characters of a field's name
OTHER_FIELDS = "other fields"  # stands for the names beyond FIELDS_KEPT


@dataclasses.dataclass
class Records:
    """Records that share a reason."""

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)  # file:line of the first few


@dataclasses.dataclass
class ReadReport:
    """Counts over all records of some files; blank lines are no records."""

    records: int = 0
    skipped: dict[str, Records] = dataclasses.field(default_factory=dict)
    changed: dict[str, Records] = dataclasses.field(default_factory=dict)
    ignored_fields: dict[str, int] = dataclasses.field(default_factory=dict)
    replies: int = 0
    shortened_replies: int = 0

    @property
    def skipped_records(self) -> int:
        return sum(records.count for records in self.skipped.values())

    def skip(self, reason: str, file: str, line: int) -> None:
        """Counts a record that was read and cannot be used."""
        _count(self.skipped, reason, file, line)

    def change(self, reason: str, file: str, line: int) -> None:
        """Counts a record that is used without a part of it."""
        _count(self.changed, reason, file, line)

    def ignore_fields(self, names: Iterable[str]) -> None:
        """Counts a record once under each of its fields that are not read."""
        shortened = {name[:FIELD_LENGTH].encode("utf-8", "replace").decode() for name in names}
        has_others = False
        for name in sorted(shortened):
            if name in self.ignored_fields or len(self.ignored_fields) < FIELDS_KEPT:
                self.ignored_fields[name] = self.ignored_fields.get(name, 0) + 1
            else:
                has_others = True
        if has_others:
            self.ignored_fields[OTHER_FIELDS] = self.ignored_fields.get(OTHER_FIELDS, 0) + 1

    def skip_lines(self) -> list[str]:
        """One line for each reason to skip a record, the most frequent first."""
        return _lines(self.skipped)

    def change_lines(self) -> list[str]:
        """One line for each reason to use a record in part, the most frequent first."""
        return _lines(self.changed)

    def check_share(self, max_skipped_fraction: float, files: str) -> None:
        """DataError where more than this share of the records, or of the replies, is lost."""
        if self.records == 0:
            raise DataError(f"{files}: the files hold no records, only blank lines or nothing")
        share = self.skipped_records / self.records
        if share > max_skipped_fraction:
            raise DataError(
                f"{files}: {self.skipped_records} of {self.records} records ({share:.1%}) cannot "
                f"be used, more than max_skipped_fraction={max_skipped_fraction:g} allows:\n  "
                + "\n  ".join(self.skip_lines())
                + "\nRepair the files, or raise max_skipped_fraction"
            )
        if self.shortened_replies > max_skipped_fraction * self.replies:
            raise DataError(
                f"{files}: the chat template deletes a part of {self.shortened_replies} of "
                f"{self.replies} replies ({self.shortened_replies / self.replies:.1%}), such as "
                f"the thoughts of earlier turns, more than "
                f"max_skipped_fraction={max_skipped_fraction:g} allows. Serving never writes such "
                f"a reply, so it is not trained. Set loss_turns=last, which asks for the last "
                f"reply only, or chat_template=FILE of a template that keeps replies whole, or "
                f"raise max_skipped_fraction"
            )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ReadReport:
        """What as_dict gave; TypeError or KeyError where it is something else."""
        reasons = {
            name: {reason: Records(**records) for reason, records in value[name].items()}
            for name in ("skipped", "changed")
        }
        return cls(**{**value, **reasons})


def _count(reasons: dict[str, Records], reason: str, file: str, line: int) -> None:
    reason = reason if len(reason) <= REASON_LENGTH else reason[:REASON_LENGTH] + "..."
    if reason not in reasons and len(reasons) >= REASONS_KEPT:
        reason = "other reasons"
    records = reasons.setdefault(reason, Records())
    records.count += 1
    if len(records.examples) < EXAMPLES_KEPT:
        records.examples.append(f"{file}:{line}")


def _lines(reasons: dict[str, Records]) -> list[str]:
    ordered = sorted(reasons.items(), key=lambda item: (-item[1].count, item[0]))
    return [
        f"{records.count} x {reason} ({', '.join(records.examples)}"
        f"{', ...' if records.count > len(records.examples) else ''})"
        for reason, records in ordered
    ]
