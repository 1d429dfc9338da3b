"""Progress lines and metrics.jsonl: pooled, and never twice for one step."""

import json

import numpy as np
import pytest

from MaxDraft.metric_logger import MetricLogger


def step(tokens, correct, aligned):
    one = np.ones(2, np.float32)
    return {
        **dict.fromkeys(("loss_sum", "kl_sum", "lk_hybrid_sum", "lk_alpha_sum"), 3 * one),
        "in_vocab_positions": 2 * one,
        "supervised_positions": aligned * one,
        "correct_positions": correct * one,
        "reached_positions": aligned * one,
        "reached_correct_positions": correct * one,
        "alpha_sum": one,
        "tokens": tokens,
        "learning_rate": 0.1,
        "gradient_norm": 1.0,
    }


def logger(folder, start_step=0):
    return MetricLogger(
        folder,
        metrics_file="metrics.jsonl",
        tensorboard=True,
        step_weights=0.5 ** np.arange(2),
        start_step=start_step,
        total_steps=10,
        flops_per_token=1e9,
        num_devices=4,
        write=True,
    )


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_pools_the_rows_of_its_steps_before_dividing(tmp_path, capsys):
    log = logger(tmp_path)
    log.train_step(1, step(100, correct=1, aligned=1))
    log.train_step(2, step(300, correct=0, aligned=9))
    log.close()
    (found,) = records(tmp_path)
    assert found["step"] == 2
    assert found["acc"] == [0.1, 0.1]  # 1 of 10 rows, not the mean of 1 and 0
    assert found["loss"] == pytest.approx(1.5 + 0.5 * 1.5)
    rate = found["tokens_per_second_per_device"]
    assert rate == pytest.approx(400 / 4 / (2 * found["seconds_per_step"]))
    assert found["tflops_per_second_per_device"] == pytest.approx(rate * 1e9 / 1e12)
    line = capsys.readouterr().out
    assert line.startswith("step 2/10  loss 2.2500  acc_0..1 0.100 0.100  sim_accept_length 1.11")
    assert list((tmp_path / "tensorboard").iterdir())


def test_records_after_the_checkpoint_are_removed_on_resume(tmp_path):
    log = logger(tmp_path)
    for number in (1, 2, 3):
        log.train_step(number, step(1, 1, 1))
        log.flush()
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')
    log = logger(tmp_path, start_step=2)
    log.train_step(3, step(1, 1, 1))
    log.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "line", [b"5", b'{"step": "1"}', b'{"step": true}', b"\xff\xfe", b"[" * 9999, b'{"spl']
)
def test_a_damaged_line_is_moved_aside_and_told(tmp_path, capsys, line):
    log = logger(tmp_path)
    log.train_step(1, step(1, 1, 1))
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    for start_step in (1, 2):
        log = logger(tmp_path, start_step)
        log.train_step(start_step + 1, step(1, 1, 1))
        log.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "damaged-metrics.jsonl").read_bytes() == line + b"\n"
    assert capsys.readouterr().out.count("1 damaged line(s) were moved") == 1
