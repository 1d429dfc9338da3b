"""What the engine report says: yes with evidence, no with a reason, else not known."""

import dataclasses
import json
from pathlib import Path

import pytest
from head_helpers import CAPTURED_LAYERS, TARGET_CONFIG, head_dims

from MaxDraft.convert.engines.report import ENGINES, engine_report
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.targets.registry import FAMILIES

SGLANG_JAX, FORK, TPU_INFERENCE, SGLANG, VLLM = (engine.name for engine in ENGINES)


def report(target=None, captured_layers=CAPTURED_LAYERS, **dims):
    """engine -> its lines, the answer in the first."""
    text = engine_report(
        Eagle3(head_dims(**dims)),
        captured_layers,
        TARGET_CONFIG | (target or {}),
        Path("/models/my target"),
        Path("/runs/q3/export"),
    )
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return {block[0].partition(":")[0]: block for block in blocks}


def answer(lines):
    return lines[0].partition(": ")[2]


def test_a_llama_target_is_served_with_evidence():
    engines = report()
    for name in (SGLANG_JAX, SGLANG, VLLM):
        assert answer(engines[name]) == "yes"
        assert any(line.startswith("  evidence: ") for line in engines[name])


def test_launch_lines_fit_any_number_of_chips():
    engines = {name: lines for name, lines in report().items() if len(lines) > 1}
    for name in (SGLANG_JAX, FORK, SGLANG):
        assert "--tp-size $NUM_CHIPS" in engines[name][-1]
        assert "--speculative-num-steps 3 --speculative-num-draft-tokens 4" in engines[name][-1]
        assert "--model-path '/models/my target'" in engines[name][-1]
        assert "--speculative-draft-model-path /runs/q3/export" in engines[name][-1]
    assert "--tensor-parallel-size $NUM_CHIPS" in engines[VLLM][-1]
    config = engines[VLLM][-1].partition("--speculative-config ")[2].strip("'")
    assert json.loads(config) == {
        "method": "eagle3",
        "model": "/runs/q3/export",
        "num_speculative_tokens": 3,
    }


def test_the_fork_is_started_without_the_overlap_schedule():
    engines = report()
    assert engines[FORK][-1].endswith("--disable-overlap-schedule")
    assert "--disable-overlap-schedule" not in engines[SGLANG_JAX][-1]


def test_no_line_is_given_where_an_engine_lacks_the_architecture():
    lines = report()[TPU_INFERENCE]
    assert answer(lines) == "no"
    assert "does not register the architecture LlamaForCausalLMEagle3" in lines[1]
    assert not any("vllm serve" in line for line in lines)


@pytest.mark.parametrize("flags", [("fc_norm",), ("norm_output",), ("fc_norm", "norm_output")])
def test_engines_that_ignore_eagle_3_1_say_no(flags):
    engines = report(**dict.fromkeys(flags, True))
    for name in (SGLANG_JAX, FORK, TPU_INFERENCE):
        assert answer(engines[name]) == "no"
        for flag in flags:
            assert any(f"ignores {flag} without a word" in line for line in engines[name])
    for name in (SGLANG, VLLM):
        assert answer(engines[name]) == "yes"


def test_fused_weights_make_phi3_a_no():
    lines = report({"model_type": "phi3"})[SGLANG_JAX]
    assert answer(lines) == "no" and "fused weights are not found" in lines[1]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_family_is_served_without_evidence(family):
    engines = report({"model_type": family})
    listed = {"llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss"}
    for engine in ENGINES:
        lines = engines[engine.name]
        if answer(lines) == "yes":
            assert family in engine.families
        assert len(lines) > 1  # a reason
    assert (answer(engines[VLLM]) == "yes") == (family in listed)
    assert (answer(engines[SGLANG_JAX]) == "yes") == (family in ("llama", "qwen3"))


def test_families_outside_vllms_list_are_a_no():
    for family in ("gemma2", "gemma3_text", "glm4", "mistral", "mixtral", "phi3", "seed_oss"):
        assert answer(report({"model_type": family})[VLLM]) == "no"


def test_limits_are_named_where_they_apply():
    tied = report({"tie_word_embeddings": True})
    assert answer(tied[SGLANG_JAX]) == "no" and "tied embeddings" in tied[SGLANG_JAX][1]
    assert answer(tied[FORK]) == "not known"
    qwen2 = report({"model_type": "qwen2"})
    assert answer(qwen2[SGLANG_JAX]) == "no" and answer(qwen2[FORK]) == "not known"
    one = report(num_kv_heads=1)
    for name in (SGLANG_JAX, FORK):
        assert answer(one[name]) == "no" and "one key/value head" in one[name][1]


def test_other_captured_layers_are_given_to_the_engine():
    other = report(captured_layers=(0, 7, 15))
    override = '--json-model-override-args \'{"eagle_config": '
    layers = '{"eagle_aux_hidden_state_layer_ids": [0, 7, 15]'
    assert override + layers in other[SGLANG_JAX][-1]
    assert any("built in" in line for line in other[TPU_INFERENCE])
    assert override not in report()[SGLANG_JAX][-1]


def test_a_kind_of_drafter_that_an_engine_does_not_read_is_a_no():
    class Other(Eagle3):
        kind = "other"

    pair = dataclasses.replace(_pair(), drafter=Other(head_dims()))
    for engine in ENGINES:
        verdict = engine.verdict(pair)
        assert verdict.answer == "no" and "reads no drafter of kind other" in verdict.reasons


def _pair():
    from MaxDraft.convert.engines.engine import ServedPair

    drafter = Eagle3(head_dims())
    config = drafter.checkpoint_format.config(drafter.dims, CAPTURED_LAYERS, TARGET_CONFIG, "")
    return ServedPair(
        drafter, CAPTURED_LAYERS, config, TARGET_CONFIG, Path("/target"), Path("/export")
    )
