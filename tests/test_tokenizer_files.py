"""A tokenizer's folder: loaded whole, or told what is wrong with it."""

import json

import numpy as np
import pytest
import transformers
from data_helpers import CHATML, HEADERS, dialogue, make_encoder, make_tokenizer

from MaxDraft.input_pipeline.chat_template import ChatEncoder
from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.tokenizer_files import load_tokenizer

FOUR = dialogue("Hello there.", "How are you?", "I am well.", "Thank you.")


def test_a_template_file_replaces_the_tokenizers_own(tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, transformers.PreTrainedTokenizerFast)
    same = ChatEncoder(loaded).encode(FOUR)
    assert np.array_equal(same.turn_ids, make_encoder(CHATML).encode(FOUR).turn_ids)
    file = tmp_path / "other.jinja"
    file.write_text(HEADERS, encoding="utf-8")
    other = ChatEncoder(load_tokenizer(tmp_path, chat_template_file=file))
    assert other.fingerprint == make_encoder(HEADERS).fingerprint
    with pytest.raises(DataError, match=r"chat_template: .*absent\.jinja cannot be read"):
        load_tokenizer(tmp_path, chat_template_file=tmp_path / "absent.jinja")


def test_a_tokenizer_without_template_says_what_to_give(tmp_path):
    make_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"has no chat template.*chat_template=FILE"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match="is not a folder with tokenizer files"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the tokenizer in .*empty cannot be loaded"):
        load_tokenizer(tmp_path / "empty")


def test_a_family_unknown_to_transformers_is_told_with_a_fix(tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    scaling = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    config = {"model_type": "kimi_k2", "rope_theta": 50000.0, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"cannot be loaded.*without config\.json, is enough"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    assert load_tokenizer(tmp_path).is_fast


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.98])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_truncated_file_is_named(tmp_path, name, share):
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=rf"{name} is damaged or cut off") as error:
        load_tokenizer(tmp_path)
    assert "trust_remote_code" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "5", "null", "[" * 100_000, '{"a": ' + "7" * 5000 + "}"])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer(\.json)? ") as error:
        load_tokenizer(tmp_path)
    assert "trust_remote_code" not in str(error.value)


def test_remote_code_is_suggested_only_where_there_is_some(tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="its own code, which trust_remote_code=True would run"):
        load_tokenizer(tmp_path)
