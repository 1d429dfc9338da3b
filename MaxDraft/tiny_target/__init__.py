"""The embedded default's target: made here, from text that every Python installation carries."""

from MaxDraft.tiny_target.build import TinyTarget, TinyTargetError, ensure_tiny_target

__all__ = ["TinyTarget", "TinyTargetError", "ensure_tiny_target"]
