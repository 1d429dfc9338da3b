"""grain_train_files and grain_eval_files: which files a run reads, and in which shares.

"GLOB[;GLOB...]"                  every conversation once per epoch
"GLOB,WEIGHT;GLOB,WEIGHT[;...]"   a mixture, as MaxText writes it: weights are normalized to
                                  shares of the conversations
"""

from __future__ import annotations

import dataclasses
import glob
import math
import shlex
from collections import Counter
from pathlib import Path

from MaxDraft.input_pipeline.errors import DataError


@dataclasses.dataclass(frozen=True)
class FileSet:
    """The files of one glob, sorted; weight: None, or its unnormalized share of a mixture."""

    pattern: str
    paths: tuple[Path, ...]
    weight: float | None = None


def parse_file_spec(spec: str) -> list[FileSet]:
    """A value of grain_train_files -> one FileSet for each of its globs.

    DataError: a glob without files, a folder, a file in two globs, a weight that is not above 0,
    weights on some of the globs only, or on a single one.
    """
    file_sets: list[FileSet] = []
    owner: dict[Path, int] = {}
    for part in filter(None, map(str.strip, spec.split(";"))):
        pattern, weight = _split_weight(part)
        matches = _matching(pattern)
        paths = tuple(path for path in matches if path.is_file())
        if not paths:
            folder = next((path for path in matches if path.is_dir()), None)
            raise DataError(
                _describe_folder(folder)
                if folder
                else f"no file matches {pattern!r}; is the path right, seen from here?"
            )
        for path in paths:
            if owner.setdefault(path.resolve(), len(file_sets)) != len(file_sets):
                raise DataError(f"{path} is in two parts of {spec!r}; name it once")
        file_sets.append(FileSet(pattern, paths, weight))
    if not file_sets:
        raise DataError("no data files are given; set grain_train_files=GLOB of .jsonl files")
    _check_weights(file_sets, spec)
    return file_sets


def _check_weights(file_sets: list[FileSet], spec: str) -> None:
    weighted = [file_set for file_set in file_sets if file_set.weight is not None]
    if weighted and len(weighted) < len(file_sets):
        raise DataError(
            f"{spec!r} gives weights to some of its parts; give every part one, as in "
            f"'a/*.jsonl,0.3;b.jsonl,0.7', or none: then every conversation is read once per epoch"
        )
    if len(weighted) == 1:
        raise DataError(
            f"{spec!r}: weights are shares of a mixture, and a single part has all of it; leave "
            f"the weight out, and raise num_epoch to read the files more often"
        )


def _matching(pattern: str) -> list[Path]:
    if "\0" in pattern:
        raise DataError(f"{pattern!r} holds a zero byte, which no path has")
    try:
        expanded = Path(pattern).expanduser()
    except RuntimeError as error:  # ~name of a user that is not there
        raise DataError(f"{pattern!r}: {error}; write the folder out") from error
    # Path.glob takes no absolute patterns.
    return sorted(map(Path, glob.glob(str(expanded), recursive=True)))  # noqa: PTH207


def _split_weight(part: str) -> tuple[str, float | None]:
    """The text after the last comma is the weight, unless it is no number: then all is a glob."""
    pattern, comma, text = part.rpartition(",")
    if not comma:
        return part, None
    try:
        weight = float(text)
    except ValueError as error:
        if _matching(part):
            return part, None
        raise DataError(
            f"{part!r}: {text.strip()!r} after the comma is not a weight; write GLOB,WEIGHT with "
            f"a number, and separate several globs with ;"
        ) from error
    if not (weight > 0 and math.isfinite(weight)):
        raise DataError(
            f"{part!r}: the weight is {text.strip()}, and must be above 0: weights are the shares "
            f"of a mixture, as in 'a/*.jsonl,0.3;b.jsonl,0.7'"
        )
    return pattern.strip(), weight


def _describe_folder(folder: Path) -> str:
    """Which files to give in place of a folder."""
    if any(folder.glob("*.arrow")) or (folder / "dataset_info.json").is_file():
        return (
            f"{folder} is a folder that the datasets library saved; write it as JSON lines: "
            f"python3 -c 'import datasets, sys; "
            f"datasets.load_from_disk(sys.argv[1]).to_json(sys.argv[2])' "
            f"{shlex.quote(str(folder))} {shlex.quote(f'{folder.absolute().name}.jsonl')}"
        )
    suffixes = Counter(path.suffix for path in folder.iterdir() if path.is_file())
    names = ", ".join(f"{count} *{suffix}" for suffix, count in suffixes.most_common(5))
    return (
        f"{folder} is a folder; name its files, such as {shlex.quote(f'{folder}/*.jsonl')} "
        f"(it holds {names or 'no files'})"
    )
