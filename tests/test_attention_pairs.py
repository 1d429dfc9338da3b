"""Pairs of query and key that blocks compute, over those that are visible, counted by hand."""

import numpy as np

from MaxDraft.cost.attention_pairs import computed_over_visible

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 2, 3, 0, 0]])[None]
SUPERVISED = np.zeros_like(SEGMENTS, bool)
SUPERVISED[0, 0, 5:7] = SUPERVISED[0, 1, 2:5] = True


def ratios(devices, target_shards):
    return computed_over_visible(
        SEGMENTS,
        SUPERVISED,
        attention_block=2,
        position_block=4,
        devices=devices,
        target_shards=target_shards,
    )


def test_the_targets_rows_attend_together_or_apart():
    visible = 10 + 10 + 6 + 3 + 1 + 3
    # Blocks of two queries see, in blocks of two keys, 1 2 1 2 and 1 2 2 1; together 1 2 2 2.
    assert ratios(1, target_shards=1)["target"] == 4 * 14 / visible
    assert ratios(1, target_shards=2)["target"] == 4 * 12 / visible


def test_the_rollouts_positions_lie_end_to_end():
    # Positions 5 6 and 10 11, then 12 alone: keys 4..6, 8..11, 11..12.
    expected = 4 * (2 + 2 + 2) / (2 + 3 + 3 + 1 + 2)
    assert ratios(1, target_shards=2)["rollout"] == expected
    assert ratios(2, target_shards=2)["rollout"] == expected  # a row for each device
