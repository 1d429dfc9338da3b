"""Encoding once, the cache, the split, the counts, and the summary of them."""

import datetime
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
import types
from pathlib import Path

import numpy as np
import pytest
from data_helpers import (
    CHATML,
    INSTRUCT,
    LAST_TURN_THINKS,
    SPECIAL,
    dialogue,
    make_encoder,
    make_tokenizer,
    many_records,
    record,
    write_lines,
)
from transformers.utils import chat_template_utils

from MaxDraft.input_pipeline import encode_files as module
from MaxDraft.input_pipeline.chat_template import ChatEncoder
from MaxDraft.input_pipeline.dataset import Dataset, held_out_mask, prepare_dataset
from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.packing import pack_epochs
from MaxDraft.input_pipeline.summary import Coverage, format_sample, summarize

END = SPECIAL.index("<|im_end|>")


def prepare(folder: Path, lines=None, **changes) -> Dataset:
    if lines is not None:
        write_lines(folder / "train.jsonl", lines)
    arguments = {
        "train_files": str(folder / "train.jsonl"),
        "eval_files": "",
        "eval_fraction": 0.25,
        "encoder": make_encoder(CHATML),
        "max_target_length": 64,
        "truncation_policy": "truncate",
        "max_skipped_fraction": 0.1,
        "seed": 0,
        "cache_dir": folder / "cache",
        "vocab_size": 500,
        "log": lambda line: None,
    }
    return prepare_dataset(**{**arguments, **changes})


def contents(documents) -> list[tuple[list[int], list[int]]]:
    return [(documents[i][0].tolist(), documents[i][1].tolist()) for i in range(len(documents))]


def test_documents_are_encoded_conversations_cut_at_a_row(tmp_path):
    records = many_records(40)
    data = prepare(tmp_path, records, max_target_length=50)
    expected, cut, gone = [], 0, 0
    for one in records:
        encoded = make_encoder(CHATML).encode(
            dialogue(*[message["content"] for message in one["messages"]])
        )
        if encoded.turn_ids[:50].any():
            expected.append((encoded.tokens[:50].tolist(), encoded.turn_ids[:50].tolist()))
            cut += len(encoded.tokens) > 50
        else:
            gone += 1
    assert sorted(contents(data.train) + contents(data.held_out)) == sorted(expected)
    assert 0 < cut < len(expected)
    assert data.train.num_cut + data.held_out.num_cut == cut
    assert sum(data.train.encoded.left_out.values()) == gone
    tokens, turn_ids = data.train[0]
    assert tokens.dtype == turn_ids.dtype == np.int32
    for i in range(len(data.train)):
        tokens, turn_ids = data.train[i]
        assert data.train.lengths[i] == len(tokens)
        assert data.train.assistant_lengths[i] == np.count_nonzero(turn_ids)


def test_policy_drop_leaves_out_what_is_longer_than_a_row(tmp_path):
    kept = prepare(tmp_path, many_records(40), max_target_length=90)
    dropped = prepare(tmp_path, max_target_length=90, truncation_policy="drop")
    cut = kept.train.num_cut + kept.held_out.num_cut
    assert cut > 0 and dropped.train.num_cut == 0
    assert len(dropped.train.encoded) == len(kept.train.encoded) - cut
    (count,) = dropped.train.encoded.left_out.values()
    assert count >= cut
    assert dropped.train.encoded.report.skipped_records == 0  # a choice, not a mistake


def test_an_unknown_truncation_policy_is_an_error(tmp_path):
    with pytest.raises(DataError, match="truncation_policy is 'split'; choose one of truncate"):
        prepare(tmp_path, many_records(4), truncation_policy="split")


def test_a_conversation_cut_before_its_reply_is_left_out(tmp_path):
    long_question = record("Hello there " * 60, "Hi")
    data = prepare(tmp_path, [*many_records(9), long_question])
    assert data.train.encoded.left_out == {module.CUT_AWAY: 1}
    assert len(data.train) + len(data.held_out) == 9


def test_a_second_run_takes_what_the_first_encoded_and_says_so(tmp_path):
    lines = []
    first = prepare(tmp_path, many_records(20), log=lines.append)
    again = prepare(tmp_path, log=lines.append)
    assert "encoding 1 files" in lines[0]
    assert f"20 conversations encoded before, taken from {first.train.encoded.folder}" in lines[1]
    assert contents(first.train) == contents(again.train)
    assert first.fingerprint == again.fingerprint
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.train.encoded.folder.name]


def test_data_that_was_removed_is_made_again_the_same(tmp_path, monkeypatch):
    def prepare_on(day: int):
        today = types.SimpleNamespace(
            now=lambda: datetime.datetime(2026, 11, day), today=lambda: datetime.date(2026, 11, day)
        )
        monkeypatch.setattr(chat_template_utils, "datetime", today)
        dated = make_tokenizer("{{ strftime_now('%d %B %Y') ~ date_string }}" + CHATML)
        return prepare(tmp_path, encoder=ChatEncoder(dated))

    write_lines(tmp_path / "train.jsonl", many_records(20))
    first = prepare_on(1)
    expected, folder = contents(first.train), first.train.encoded.folder
    shutil.rmtree(tmp_path / "cache")
    again = prepare_on(2)
    assert (again.train.encoded.folder, again.fingerprint) == (folder, first.fingerprint)
    assert contents(again.train) == expected


def test_only_what_changes_the_tokens_changes_the_folder(tmp_path):
    records = many_records(20)
    base = prepare(tmp_path, records).train.encoded.folder
    assert prepare(tmp_path, seed=1, eval_fraction=0.5).train.encoded.folder == base
    assert prepare(tmp_path, train_files=f"{tmp_path}/*.jsonl").train.encoded.folder == base
    os.utime(tmp_path / "train.jsonl", (0, 0))
    assert prepare(tmp_path).train.encoded.folder == base
    for changes in (
        {"max_target_length": 63},
        {"truncation_policy": "drop"},
        {"encoder": make_encoder(CHATML, "last")},
        {"encoder": make_encoder(INSTRUCT)},
        {"lines": records[:-1]},
    ):
        assert prepare(tmp_path, **changes).train.encoded.folder != base


@pytest.mark.parametrize("name", ["tokens.npy", "turn_ids.npy", "report.json", "offsets.npy"])
@pytest.mark.parametrize("damage", ["cut off", "one bit"])
def test_a_damaged_folder_is_told_and_made_again(tmp_path, name, damage):
    first = prepare(tmp_path, many_records(20))
    expected = contents(first.train)
    file = first.train.encoded.folder / name
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        content[-20] ^= 1
    file.write_bytes(content if damage == "one bit" else content[:-30])
    lines = []
    again = prepare(tmp_path, log=lines.append)
    assert re.search(rf"is damaged: .*{name}.*; it is made again", lines[0])
    assert "encoding" in lines[1]
    assert contents(again.train) == expected
    lines.clear()
    prepare(tmp_path, log=lines.append)
    assert "encoded before" in lines[0]


def _encode_slowly(folder: Path) -> None:
    module.CHUNK = 1
    append = module.Column.append

    def slow(self, values):
        append(self, values)
        self._file.flush()
        time.sleep(0.002)

    module.Column.append = slow
    prepare(folder)


def test_a_killed_run_leaves_nothing_that_is_taken_for_whole(tmp_path):
    write_lines(tmp_path / "train.jsonl", many_records(200))
    process = multiprocessing.get_context("fork").Process(target=_encode_slowly, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("cache/.*/tokens.npy")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(tmp_path.glob("cache/.*/tokens.npy"))  # it was in the middle of it
    assert not list(tmp_path.glob("cache/[!.]*"))
    lines = []
    data = prepare(tmp_path, log=lines.append)
    assert "encoding" in lines[0]
    assert len(data.train) + len(data.held_out) == 200
    assert not list(tmp_path.glob("cache/.*"))  # what was left behind is gone


def test_the_split_depends_on_words_and_seed_only(tmp_path):
    records = many_records(300)
    data = prepare(tmp_path, records + records[:100])
    train = {str(one) for one in contents(data.train)}
    out = {str(one) for one in contents(data.held_out)}
    assert not train & out  # duplicates are on one side
    assert 0.15 < len(data.held_out) / 400 < 0.35
    shuffled = prepare(tmp_path, records[::-1] + many_records(10, seed=9))
    assert out <= {str(one) for one in contents(shuffled.held_out)}
    other = prepare(tmp_path, seed=1)
    assert {str(one) for one in contents(other.held_out)} != out


def test_neither_side_of_the_split_is_empty():
    hashes = np.array([7, 8, 9, 7], np.uint64)
    for fraction in (1e-9, 0.02, 0.999999):
        mask = held_out_mask(hashes, fraction, seed=0)
        assert 0 < mask.sum() < 4
        assert mask[0] == mask[3]
    with pytest.raises(DataError, match="the same one: nothing can be held out"):
        held_out_mask(hashes[[0, 3]], 0.5, seed=0)


def test_eval_files_are_held_out_and_never_trained_on(tmp_path):
    records = many_records(30)
    write_lines(tmp_path / "eval.jsonl", many_records(5, seed=1) + records[:3])
    data = prepare(tmp_path, records, eval_files=str(tmp_path / "eval.jsonl"))
    assert (len(data.train), len(data.held_out), data.also_held_out) == (27, 8, 3)
    assert set(data.held_out.weights) == {1.0}
    with pytest.raises(DataError, match="nothing is left to train on"):
        prepare(tmp_path, records[:3], eval_files=str(tmp_path / "eval.jsonl"))


def test_weights_of_a_mixture_are_shares_of_every_epoch(tmp_path):
    write_lines(tmp_path / "a.jsonl", many_records(90))
    write_lines(tmp_path / "b.jsonl", many_records(120, seed=1))
    write_lines(tmp_path / "eval.jsonl", many_records(5, seed=2))
    names = [f"{tmp_path}/{name}.jsonl" for name in "ab"]
    evals = {"eval_files": f"{tmp_path}/eval.jsonl"}

    def conversations_per_epoch(*weights):
        spec = ";".join(f"{name},{weight}" for name, weight in zip(names, weights, strict=True))
        data = prepare(tmp_path, train_files=spec, **evals)
        rows = pack_epochs(data.train.lengths, data.train.weights, 64, 0, 2)
        parts = data.train.encoded.columns["file_set"][data.train.ids]
        ends = [0, *(rows.offsets[end] for end in rows.epoch_ends)]
        return [
            np.bincount(parts[rows.documents[start:end]], minlength=2).tolist()
            for start, end in itertools.pairwise(ends)
        ]

    # The epoch ends where the first of the two has been read once, whatever the weights' sum.
    assert conversations_per_epoch(0.75, 0.25) == [[90, 30]] * 2
    assert conversations_per_epoch(3, 1) == [[90, 30]] * 2
    assert conversations_per_epoch(1, 3) == [[40, 120]] * 2
    plain = prepare(tmp_path, train_files=";".join(names), **evals)
    assert set(plain.train.weights) == {1.0}
    weighted = prepare(tmp_path, train_files=f"{names[0]},1;{names[1]},1", **evals)
    assert weighted.fingerprint != plain.fingerprint
    with pytest.raises(DataError, match="has weights, which have no effect there"):
        prepare(tmp_path, train_files=names[0], eval_files=f"{names[0]},1;{names[1]},1")
    write_lines(tmp_path / "b.jsonl", many_records(5, seed=2))
    with pytest.raises(DataError, match=r"b\.jsonl' has a share .* no conversation that can be"):
        conversations_per_epoch(1, 1)


def test_records_that_the_template_refuses_count_as_unusable(tmp_path):
    refused = {"messages": [record("a", "b")["messages"][i] for i in (0, 0, 1)]}
    lines = [*many_records(8), "{", refused]
    encoder = make_encoder(INSTRUCT)
    data = prepare(tmp_path, lines, encoder=encoder, max_skipped_fraction=0.2)
    report = data.train.encoded.report
    assert (report.records, report.skipped_records) == (10, 2)
    assert any("roles must alternate" in reason for reason in report.skipped)
    for _ in range(2):  # from the cache too
        with pytest.raises(DataError, match=r"2 of 10 records \(20.0%\) cannot be used"):
            prepare(tmp_path, encoder=encoder, max_skipped_fraction=0.19)


def test_replies_that_the_template_shortens_are_bounded(tmp_path):
    thought = "<think>\nthe lazy dog\n</think>\n\nThe fox."
    lines = [*many_records(30), record("How", thought, "More", thought)]
    encoder = make_encoder(LAST_TURN_THINKS)
    data = prepare(tmp_path, lines, encoder=encoder, max_target_length=256)
    report = data.train.encoded.report
    assert report.shortened_replies == 1 and report.replies > 31
    assert {reason: one.count for reason, one in report.changed.items()} == {module.SHORTENED: 1}
    rows = pack_epochs(data.train.lengths, data.train.weights, 256, 0, 1)
    summary = summarize(data, rows, 256)
    assert summary.shortened_replies == 1
    text = f"replies that the chat template shortens, not trained: 1 of {report.replies}"
    assert text in summary.text()
    with pytest.raises(DataError, match=r"deletes a part of 1 of .*Set loss_turns=last"):
        prepare(tmp_path, encoder=encoder, max_target_length=256, max_skipped_fraction=0.01)


def test_a_set_without_assistant_tokens_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no assistant token in the whole set") as error:
        prepare(tmp_path, many_records(5), max_target_length=2)
    assert f"5 x {module.CUT_AWAY}" in str(error.value)
    assert "max_target_length=2" in str(error.value)


def test_counts_are_of_the_assistants_training_tokens(tmp_path):
    data = prepare(tmp_path, many_records(40))
    counts = data.train.assistant_token_counts(500)
    pairs = [data.train[i] for i in range(len(data.train))]
    by_hand = np.concatenate([tokens[turn_ids > 0] for tokens, turn_ids in pairs])
    assert counts.dtype == np.int64
    assert counts.tolist() == np.bincount(by_hand, minlength=500).tolist()
    assert counts.sum() == data.train.assistant_lengths.sum()
    assert counts[END] > 0
    assert counts[SPECIAL.index("<|im_start|>")] == 0  # the template's, never the assistant's
    largest = data.train.encoded.largest_token
    assert largest == max(tokens.max() for d in (data.train, data.held_out) for tokens, _ in d)
    prepare(tmp_path, vocab_size=largest + 1)
    with pytest.raises(DataError, match=rf"vocab_size is {largest}: .* check tokenizer_path"):
        prepare(tmp_path, vocab_size=largest)


def test_a_prompt_is_what_stands_before_the_first_reply(tmp_path):
    data = prepare(tmp_path, [record("Hello", "Hi"), record("How", "So")])
    prompts = {make_encoder(CHATML).decode(d.prompt(0)) for d in (data.train, data.held_out)}
    assert prompts == {
        f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in ("Hello", "How")
    }


def test_documents_travel_to_other_processes_without_the_data(tmp_path):
    data = prepare(tmp_path, many_records(200))
    expected = contents(data.train)
    sent = pickle.dumps(data.train)
    assert len(sent) < data.train.lengths.sum()  # a copy of the tokens would be four times that
    assert contents(pickle.loads(sent)) == expected


def test_the_summary_names_every_number_and_its_denominator(tmp_path):
    data = prepare(tmp_path, [*many_records(60), "{", ""], max_target_length=60)
    train, out = data.train, data.held_out
    rows = pack_epochs(train.lengths, train.weights, 60, 0, 3)
    summary = summarize(data, rows, 60, Coverage(100, 500, 0.9876))
    R = rows.epoch_ends[0]
    assert summary.records_read == 61 and summary.records_skipped == 1
    assert summary.packing_efficiency == pytest.approx(train.lengths.sum() / (R * 60))
    text = summary.text()
    tokens, written = int(train.lengths.sum()), int(train.assistant_lengths.sum())
    for expected in (
        "records read: 61, of them skipped: 1 (1.64% of the records)",
        f"1 x not JSON ({tmp_path}/train.jsonl:61)",
        f"train: {len(train)} conversations, {tokens} tokens, of them {written} the assistant's "
        f"({written / tokens:.1%} of the tokens)",
        f"held out: {len(out)} conversations",
        f"{train.num_cut} conversations truncated to 60 tokens",
        f"packing: {R} rows of 60 positions in the first epoch",
        f"100 of 500 tokens; they are 98.76% of the {written} assistant tokens to train on",
    ):
        assert expected in text
    whole = json.loads(json.dumps(summary.as_dict()))
    assert whole["train"]["assistant_tokens"] == written
    assert whole["ignored_fields"] == {} and whole["template_date"] == "2024-07-26"


def test_a_sample_shows_the_mask():
    encoder = make_encoder(CHATML)
    encoded = encoder.encode(dialogue("Hello", "Hi", "So", "Well"))
    shown = format_sample(encoded.tokens, encoded.turn_ids, encoder.decode)
    assert shown == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦Hi<|im_end|>⟧\n"
        "<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n⟦Well<|im_end|>⟧"
        + ("\n" if encoded.turn_ids[-1] == 0 else "")
    )
    short = format_sample(encoded.tokens, encoded.turn_ids, encoder.decode, max_tokens=10)
    assert f"[... {len(encoded.tokens) - 10} tokens ...]" in short
