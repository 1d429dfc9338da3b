"""Files of conversations -> a folder of encoded conversations, made once.

The folder's name is a hash of all that decides its contents: the files' bytes, the tokenizer, the
template, the keys. It is written under another name and renamed when complete, so that a folder
that exists is whole, and several processes may prepare the same data at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from MaxDraft import storage
from MaxDraft.input_pipeline.chat_template import ChatEncoder, EncodedConversation
from MaxDraft.input_pipeline.conversations import Conversation
from MaxDraft.input_pipeline.encoded import (
    COLUMNS,
    Column,
    DamagedError,
    Encoded,
    hash_file,
    open_encoded,
    write_report,
)
from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.file_spec import FileSet
from MaxDraft.input_pipeline.read_report import ReadReport
from MaxDraft.input_pipeline.readers.records import read_conversations

FORMAT = 2  # of the folder, and of what is read from records; raise it when either changes
TRUNCATION_POLICIES = ("truncate", "drop")
TOO_LONG = "longer than max_target_length, and truncation_policy=drop"
CUT_AWAY = "no assistant token among the first max_target_length"
SHORTENED = "a reply of which the chat template deletes a part is context and not trained"
PROGRESS_SECONDS = 15.0  # between lines while encoding
CHUNK = 256  # conversations tokenized at a time, fewer where they are long:
CHUNK_CHARACTERS = 1 << 21  # a tokenizer takes 200 bytes a character or more while it encodes
MAX_TURNS = np.iinfo(np.uint16).max


def encode_files(
    file_sets: Sequence[FileSet],
    encoder: ChatEncoder,
    max_target_length: int,
    truncation_policy: str,
    cache_dir: Path,
    log: Callable[[str], None] = print,
) -> Encoded:
    """Every usable conversation of the files in tokens; from the cache where it is there.

    What cannot be used is in the report; it is the caller who decides how much is too much.
    A folder that is not what was written is encoded again. DataError: a file that cannot be read,
    a folder that cannot be written.
    """
    if truncation_policy not in TRUNCATION_POLICIES:
        raise DataError(
            f"truncation_policy is {truncation_policy!r}; choose one of "
            f"{', '.join(TRUNCATION_POLICIES)}"
        )
    cache_dir = storage.as_path(cache_dir)
    key = _cache_key(file_sets, encoder, max_target_length, truncation_policy)
    folder = cache_dir / key[:32]
    if folder.exists():
        try:
            encoded = open_encoded(folder, file_sets)
            log(f"data: {len(encoded)} conversations encoded before, taken from {folder}")
            return encoded
        except DamagedError as error:
            log(f"data: {folder} is damaged: {error}; it is made again")
    log(f"data: encoding {sum(len(one.paths) for one in file_sets)} files into {folder}")
    try:
        storage.remove_abandoned(cache_dir)
        with storage.fresh_folder(folder) as fresh:
            _write(fresh, file_sets, encoder, max_target_length, truncation_policy, log)
            storage.flush_folder(fresh)
            try:
                fresh.rename(folder)
            except OSError:
                _replace_damaged(fresh, folder, file_sets)
        return open_encoded(folder, file_sets)
    except OSError as error:
        raise DataError(
            f"the encoded data cannot be written to {cache_dir}: {error.strerror or error}"
        ) from error
    except DamagedError as error:
        raise DataError(
            f"the encoded data in {folder} is damaged: {error}; the disk does not keep what is "
            f"written, give another base_output_directory"
        ) from error


def _replace_damaged(fresh: Path, folder: Path, file_sets: Sequence[FileSet]) -> None:
    """Another process was faster, or what has the name was damaged after it was written."""
    try:
        open_encoded(folder, file_sets)
    except DamagedError:
        storage.replace_folder(fresh, folder)


def _write(
    folder: Path,
    file_sets: Sequence[FileSet],
    encoder: ChatEncoder,
    T: int,
    policy: str,
    log: Callable[[str], None],
) -> None:
    report, left_out = ReadReport(), dict.fromkeys((TOO_LONG, CUT_AWAY), 0)
    hasher, largest_token = hashlib.sha256(), 0
    files = {name: (folder / f"{name}.npy").open("wb") for name in COLUMNS}
    try:
        columns = {name: Column(files[name], dtype) for name, dtype in COLUMNS.items()}
        columns["offsets"].append([0])
        last_log = time.monotonic()
        for file_set, conversation, encoded in _encode(file_sets, encoder, report):
            length = len(encoded.tokens)
            if length > T and policy == "drop":
                left_out[TOO_LONG] += 1
                continue
            tokens, turn_ids = encoded.tokens[:T], encoded.turn_ids[:T]
            if not turn_ids.any():
                left_out[CUT_AWAY] += 1
                continue
            hasher.update(tokens.tobytes() + turn_ids.tobytes())
            largest_token = max(largest_token, int(tokens.max()))
            columns["tokens"].append(tokens)
            columns["turn_ids"].append(turn_ids)
            columns["offsets"].append([columns["tokens"].length])
            columns["assistant"].append([np.count_nonzero(turn_ids)])
            columns["content_hash"].append([conversation.content_hash])
            columns["file_set"].append([file_set])
            columns["cut"].append([length > T])
            if time.monotonic() - last_log > PROGRESS_SECONDS:
                last_log = time.monotonic()
                log(f"data: {columns['cut'].length} conversations encoded, {report.records} read")
        for column in columns.values():
            column.finish()
    finally:
        for file in files.values():
            file.close()
    counted = {reason: count for reason, count in left_out.items() if count}
    write_report(folder, report, counted, largest_token, hasher.hexdigest())


def _encode(
    file_sets: Sequence[FileSet], encoder: ChatEncoder, report: ReadReport
) -> Iterator[tuple[int, Conversation, EncodedConversation]]:
    """Number of the file set, conversation and its tokens, in the order of the files."""
    conversations = (
        (number, conversation)
        for number, file_set in enumerate(file_sets)
        for path in file_set.paths
        for conversation in read_conversations(path, report)
    )
    for chunk in _chunks(conversations):
        results = encoder.encode_batch([conversation.messages for _, conversation in chunk])
        for (number, conversation), result in zip(chunk, results, strict=True):
            where = conversation.file, conversation.line
            if not isinstance(result, EncodedConversation):
                report.skip(str(result), *where)
                continue
            report.replies += result.replies
            report.shortened_replies += result.shortened_replies
            if not result.turn_ids.any():
                report.skip("no assistant token", *where)
            elif result.turn_ids.max() > MAX_TURNS:
                report.skip(f"more than {MAX_TURNS} assistant turns", *where)
            else:
                if result.shortened_replies:
                    report.change(SHORTENED, *where)
                yield number, conversation, result


def _chunks(
    conversations: Iterator[tuple[int, Conversation]],
) -> Iterator[list[tuple[int, Conversation]]]:
    chunk, characters = [], 0
    for number, conversation in conversations:
        chunk.append((number, conversation))
        characters += sum(len(message.content) for message in conversation.messages)
        if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _cache_key(file_sets: Sequence[FileSet], encoder: ChatEncoder, T: int, policy: str) -> str:
    """Bytes rather than names and dates: a copy of the data on another host is the same data."""
    try:
        files = [[hash_file(path) for path in file_set.paths] for file_set in file_sets]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    parts = [FORMAT, files, encoder.fingerprint, T, policy]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
