"""The tokens that end a reply, as config.json and generation_config.json name them."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets.dims import TargetError
from MaxDraft.targets.fields import shown


def stop_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The `eos_token_id`s of both files in ascending order; engines stop at any of them.

    Either file may hold one id, a list of ids, null, or nothing. TargetError, which names the file,
    for anything else.
    """
    ids: set[int] = set()
    files = {"config.json": config, "generation_config.json": generation_config}
    for name, fields in files.items():
        if fields is None:
            continue
        if not isinstance(fields, Mapping):
            raise TargetError(f"{name} must be an object of fields, not {shown(fields)}")
        value = fields.get("eos_token_id")
        listed = value if isinstance(value, list | tuple) else [] if value is None else [value]
        for token in listed:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise TargetError(
                    f"{name}: eos_token_id must be a token id or a list of them, not {shown(value)}"
                )
            ids.add(token)
    return tuple(sorted(ids))
