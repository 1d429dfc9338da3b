"""A conversation as every reader gives it, whatever file and record it was read from."""

from __future__ import annotations

import dataclasses
import hashlib
import json


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. role: system, user or assistant."""

    role: str
    content: str
    # What the assistant thought before it answered, where the record keeps it in a field of its
    # own (`reasoning_content`); thoughts inside of the content stay there.
    reasoning: str = ""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages of which at least one is the assistant's, and where they were read."""

    messages: tuple[Message, ...]
    file: str
    line: int  # 1-based

    @property
    def content_hash(self) -> int:
        """64 bits that are equal for equal messages, wherever they were read."""
        parts = [
            [message.role, message.content, *([message.reasoning] if message.reasoning else [])]
            for message in self.messages
        ]
        digest = hashlib.sha256(json.dumps(parts).encode()).digest()
        return int.from_bytes(digest[:8], "little")
