"""The tokenizer of a target's folder, with its chat template; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from MaxDraft.input_pipeline.errors import DataError

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")


def load_tokenizer(
    path: Path, trust_remote_code: bool = False, chat_template_file: Path | None = None
) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a folder; chat_template_file: a Jinja template that replaces its own.

    DataError: no such folder or file, a file that is damaged, a tokenizer that cannot be loaded or
    has no fast version (only those know character offsets), no chat template.
    """
    if not path.is_dir():
        raise DataError(f"tokenizer_path: {path} is not a folder with tokenizer files")
    contents = {name: _read_json(path / name) for name in JSON_FILES if (path / name).is_file()}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code
        )
    # The library that reads tokenizer.json raises plain Exception, and transformers whatever a
    # field of another kind than expected leads to.
    except Exception as error:
        raise DataError(_describe_failure(path, contents, trust_remote_code, error)) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {path} has no fast version, and only fast ones know which "
            f"characters a token covers; convert it to a tokenizer.json"
        )
    if chat_template_file:
        try:
            tokenizer.chat_template = Path(chat_template_file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"chat_template: {chat_template_file} cannot be read: {error}"
            ) from error
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer in {path} has no chat template: the prompts the target is served with "
            f"cannot be known. Take the tokenizer of the instruction-tuned model, or give the "
            f"Jinja file it is served with: chat_template=FILE"
        )
    return tokenizer


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged or cut off ({error}); copy it again from where the target came from"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; copy it again from where the target came")
    return content


def _describe_failure(
    path: Path, contents: dict[str, dict], trust_remote_code: bool, error: Exception
) -> str:
    message = f"the tokenizer in {path} cannot be loaded: {error or type(error).__name__}"
    if "auto_map" in contents.get("tokenizer_config.json", {}) and not trust_remote_code:
        return f"{message}; it brings its own code, which trust_remote_code=True would run"
    if "tokenizer.json" not in contents:
        return f"{message}; the folder has no tokenizer.json, which is what is read here"
    if "config.json" in contents:
        # transformers reads config.json as well, and fails at families that it does not know.
        message += "; a folder of the tokenizer's files alone, without config.json, is enough"
    return message
