"""Which rows train: written out by hand, token by token."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from MaxDraft.drafts.alignment import loss_mask


def rows(layout, steps, alignment):
    """Per step, the marked rows of a one-row layout, as text of 0 and 1 like the layout."""
    turns, segments, _ = reference.read_layout([layout])
    aligned = loss_mask(
        jnp.asarray(turns, jnp.int32), jnp.asarray(segments, jnp.int32), steps, alignment
    )
    return ["".join(str(int(x)) for x in step[0]) for step in np.asarray(aligned)]


def test_serving_positions_run_from_prompt_end_to_reply_end():
    # x[4..8] is the reply. Row 3 reads x[4] and drafts x[5]; row 6 drafts x[8], the end of turn.
    assert rows("pppp11111pp", 5, "serving") == [
        "00011110000",
        "00011100000",
        "00011000000",
        "00010000000",
        "00000000000",
    ]


def test_specforge_rows_are_the_unshifted_mask_sliding_left():
    assert rows("pppp11111pp", 3, "specforge") == ["00001111100", "00011111000", "00111110000"]


def test_specforge_positions_end_with_their_document():
    assert rows("pp111|pp111", 2, "specforge") == ["0011000110", "0110001100"]


def test_a_chain_never_crosses_from_one_turn_into_the_next():
    assert rows("p111222p", 3, "serving") == ["11011000", "10010000", "00000000"]


def test_a_chain_never_crosses_a_hole_in_the_mask():
    assert rows("p11p111p", 2, "serving") == ["10011000", "00010000"]


def test_no_draft_crosses_into_the_next_document():
    assert rows("p11|11111", 2, "serving") == ["10011100", "00011000"]


def test_equal_turn_numbers_join_no_two_documents():
    # Turns are numbered inside their document, so that 1 may meet 1 where two documents touch.
    assert rows("p111|1111p", 3, "serving") == ["110011000"[:9], "100010000"[:9], "000000000"]


@pytest.mark.parametrize("alignment", ["serving", "specforge"])
def test_packed_positions_equal_a_scan_of_each_document(alignment):
    rng = np.random.default_rng(0)
    layout = ["".join(rng.choice(list("p11112||"), 40)) for _ in range(40)]
    layout = [row.replace("|", "", row.count("|") - 5)[-30:].strip("|") for row in layout]
    layout = [row + "." * (40 - len(row.replace("|", ""))) for row in layout]
    turns, segments, _ = reference.read_layout(layout)
    ours = loss_mask(jnp.asarray(turns, jnp.int32), jnp.asarray(segments, jnp.int32), 4, alignment)
    expected = np.zeros_like(ours)
    for b in range(len(turns)):
        for start, end in reference.documents_of(segments[b]):
            for i in range(end - start):
                for k in range(4):
                    expected[k, b, start + i] = reference.is_supervised(
                        turns[b, start:end], i, k, alignment
                    )
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("alignment", ["serving", "specforge"])
def test_a_pad_is_never_a_row_wherever_it_stands(alignment):
    turns = jnp.asarray([[0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0]], jnp.int32)
    segments = jnp.asarray([[0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 0]], jnp.int32)
    aligned = np.asarray(loss_mask(turns, segments, 7, alignment))
    assert not aligned[:, segments == 0].any()
