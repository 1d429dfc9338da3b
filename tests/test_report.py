"""report.txt is made from evaluation.json alone and tells the same numbers."""

import json

from MaxDraft.report import text as report

RESULT = {
    "step": 40,
    "run": {
        "run_name": "q 3",
        "run_directory": "/runs/q 3",
        "model_name": "qwen3-8b",
        "drafter": "eagle3",
        "target_path": "/models/Qwen3-8B",
        "target_layer_ids": [1, 17, 32],
        "total_steps": 50,
        "export_path": "/runs/q 3/export",
    },
    "settings": {"draft_steps": 5, "max_new_tokens": 64},
    "acc": [0.75, 0.5],
    "cond_acc": [0.75, 0.625],
    "alpha": [0.5, 0.25],
    "sim_accept_length": 2.21875,
    "accept_length": 2.5,
    "accept_length_engine": 2.75,
    "accept_length_untrained": 1.0,
    "sampled": {"temperature": 1.0, "accept_length": 2.25, "reply_tokens": 9},
    "lossless": False,
    "unequal_replies": [{"prompt": 1, "token": 3}],
    "tokens_per_second": {"plain": 100.0, "speculative": 150.0},
    "speedup": 1.5,
    "distinct_4gram_share": 0.9,
    "distinct_4gram_share_of_all_replies": 0.8,
    "prompts": 8,
    "reply_tokens": 123,
}


def test_the_report_tells_its_evaluation():
    text = report.of_result(json.loads(json.dumps(RESULT)))
    for part in (
        "accept_length 2.50 tokens per verify step, greedy, 5 draft steps, 8 held-out prompts",
        "as engines count: 2.75; an untrained head: 1.00",
        "at temperature 1: 2.25",
        "lossless    false",
        "speedup     1.50",
        "this is the head of step 40",
        "run_name='q 3' base_output_directory=/runs decode_draft_steps=5",
    ):
        assert part in text


def test_the_table_has_a_row_for_every_step():
    lines = report.evaluation_table(RESULT).splitlines()
    assert lines[2].split() == ["0", "0.750", "0.750", "0.500"]
    assert lines[3].split() == ["1", "0.500", "0.625", "0.250"]
    assert any("1 of 8 differ" in line for line in lines)
