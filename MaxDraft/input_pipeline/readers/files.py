"""A file of JSON lines, plain or gzip -> its lines.

Any other file is an error that names the command which converts it.
A file is known by its first bytes, not by its name, since names are often wrong.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from MaxDraft.input_pipeline.errors import DataError

# A longer line is skipped: it would take many times its size in memory as Python's objects. A
# conversation of that length is beyond what any target can read at once.
MAX_LINE_BYTES = 1 << 24
CHUNK_BYTES = 1 << 20
GZIP = b"\x1f\x8b"
# First bytes of what is no file of JSON lines, what it is, and the command that makes one of it.
OTHER_FORMS = {
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "zstd -d {path} -o {output}"),
    b"BZh": ("compressed with bzip2", "bzip2 -dc {path} > {output}"),
    b"\xfd7zXZ": ("compressed with xz", "xz -dc {path} > {output}"),
    b"PK\x03\x04": ("a zip archive", "unzip -p {path} > {output}"),
    b"PAR1": (
        "a Parquet file",
        'python3 -c "import pandas, sys; '
        "pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\" "
        "{path} {output}",
    ),
    b"ARROW1": (
        "an Arrow file",
        'python3 -c "import datasets, sys; '
        'datasets.Dataset.from_file(sys.argv[1]).to_json(sys.argv[2])" {path} {output}',
    ),
    codecs.BOM_UTF16_LE: ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 {path} > {output}"),
    codecs.BOM_UTF16_BE: ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 {path} > {output}"),
    b"{\0": ("UTF-16 text", "iconv -f UTF-16LE -t UTF-8 {path} > {output}"),
    b"\0{": ("UTF-16 text", "iconv -f UTF-16BE -t UTF-8 {path} > {output}"),
}


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, the line without white space around it) for every line that has text.

    None stands for a line of more than MAX_LINE_BYTES, which is not kept in memory. CRLF and a
    byte order mark are accepted. DataError: a file that cannot be opened, is damaged, or is not
    made of JSON lines.
    """
    number = 0
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            start = file.peek(8)[:8]
            if start.startswith(GZIP):
                file = stack.enter_context(gzip.open(file))
            else:
                _check_form(path, start)
            first = True
            for number, line in enumerate(_bounded_lines(file), start=1):
                if number == 1 and line is not None:
                    line = line.removeprefix(codecs.BOM_UTF8)
                text = line if line is None else line.strip()
                if text == b"":
                    continue
                if first and text and _opens_array(text):
                    raise _array_error(path, is_gzip=start.startswith(GZIP))
                first = False
                yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is damaged or cut off behind line {number}: {error}; fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _bounded_lines(file: BinaryIO) -> Iterator[bytes | None]:
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(CHUNK_BYTES)
        yield None


def _check_form(path: Path, start: bytes) -> None:
    for magic, (form, command) in OTHER_FORMS.items():
        if start.startswith(magic):
            command = command.format(path=shlex.quote(str(path)), output=_free_name(path))
            raise DataError(
                f"{path} is {form}, and UTF-8 JSON lines are read here, one record a line, plain "
                f"or .gz. Convert it with: {command}"
            )


def _opens_array(text: bytes) -> bool:
    """A first line that opens a JSON array of records."""
    return text.startswith(b"[") and text[1:].lstrip()[:1] in (b"", b"{")


def _array_error(path: Path, is_gzip: bool) -> DataError:
    name, output = shlex.quote(str(path)), _free_name(path)
    command = f"gzip -dc {name} | jq -c '.[]'" if is_gzip else f"jq -c '.[]' {name}"
    return DataError(
        f"{path} is one JSON array; one record per line is read here. Convert it with: "
        f"{command} > {output}"
    )


def _free_name(path: Path) -> str:
    """A file beside `path` that is not there yet, quoted for a shell."""
    stem = path.name.split(".")[0] or "data"
    output, number = path.with_name(f"{stem}.lines.jsonl"), 1
    while output.exists():
        number += 1
        output = path.with_name(f"{stem}.lines-{number}.jsonl")
    return shlex.quote(str(output))
