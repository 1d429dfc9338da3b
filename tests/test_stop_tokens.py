"""Tokens that end a reply are read from both files, or an error names the file."""

import pytest

from MaxDraft.targets.dims import TargetError
from MaxDraft.targets.stop_tokens import stop_token_ids

HUGE = pytest.param(10**5000, id="5,000 digits")


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        ({}, None, ()),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({"eos_token_id": [9, 7]}, {"eos_token_id": 8}, (7, 8, 9)),
        ({"eos_token_id": 0}, {"eos_token_id": [0, 1]}, (0, 1)),
    ],
)
def test_the_ids_of_both_files_end_a_reply(config, generation_config, expected):
    assert stop_token_ids(config, generation_config) == expected


@pytest.mark.parametrize(
    "value", ["x", [[1]], ["1"], True, [True], 1.0, -1, {"a": 1}, float("nan"), HUGE, [None]]
)
def test_an_id_of_another_kind_is_an_error_that_names_the_file(value):
    with pytest.raises(TargetError, match=r"^config\.json: eos_token_id must be"):
        stop_token_ids({"eos_token_id": value})
    with pytest.raises(TargetError, match=r"^generation_config\.json: eos_token_id must be"):
        stop_token_ids({}, {"eos_token_id": value})


@pytest.mark.parametrize("root", [[1], "x", 5])
def test_a_file_that_is_no_object_is_an_error(root):
    with pytest.raises(TargetError, match=r"generation_config\.json must be an object"):
        stop_token_ids({}, root)
