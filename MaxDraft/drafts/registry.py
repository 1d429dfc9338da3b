"""The drafters, found as target families are: every folder of drafts/ that has a drafter.py."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from MaxDraft import drafts
from MaxDraft.drafts.drafter import Drafter, DrafterError


@functools.cache
def drafters() -> Mapping[str, type[Drafter]]:
    """kind -> class, sorted by kind."""
    modules = (
        importlib.import_module(f"{drafts.__name__}.{found.name}.drafter")
        for found in pkgutil.iter_modules(drafts.__path__)
        if found.ispkg
    )
    classes = {module.DRAFTER.kind: module.DRAFTER for module in modules}
    return MappingProxyType(dict(sorted(classes.items())))


def drafter_class(kind: str) -> type[Drafter]:
    """The class of a kind; DrafterError names those that there are."""
    if kind not in drafters():
        raise DrafterError(f"drafter={kind} is not known; known: {', '.join(drafters())}")
    return drafters()[kind]


def from_identity(identity: Mapping[str, Any]) -> Drafter:
    """The drafter that a checkpoint's identity says: `drafter`, its kind, and `head`, its dims.

    Checkpoints from before drafters had kinds store none; they are EAGLE-3's.
    """
    return drafter_class(identity.get("drafter", "eagle3")).from_saved_dims(identity["head"])


def identity(drafter: Drafter) -> dict[str, Any]:
    """What a checkpoint's identity says of a drafter, JSON-able."""
    return {"drafter": drafter.kind, "head": drafter.saved_dims()}


def upgraded(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's identity as this version would have written it."""
    if "head" not in saved:
        return {"drafter": "eagle3", **saved}
    return {**saved, **identity(from_identity(saved))}


def kind_of_folder(config: Mapping[str, Any], tensor_names: Collection[str]) -> str | None:
    """The kind of drafter in a folder with this config.json and these tensors; None: not known."""
    for kind, drafter in drafters().items():
        if drafter.checkpoint_format.recognizes(config, tensor_names):
            return kind
    return None
