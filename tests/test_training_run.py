"""What is wrong with a run is told before anything is made."""

import pytest

from MaxDraft import pyconfig
from MaxDraft.drafts.drafter import DrafterError
from MaxDraft.errors import UserError
from MaxDraft.run import training_run


def test_an_unknown_drafter_is_an_error_before_anything_is_made(tmp_path):
    config = pyconfig.initialize(
        ["train.py", "configs/base.yml", f"base_output_directory={tmp_path}", "drafter=eagle4"]
    )
    with pytest.raises(DrafterError, match="drafter=eagle4 is not known; known: eagle3"):
        training_run.open_for_training(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("grain_train_files=/nowhere/*.jsonl", "no file matches"),
        ("load_parameters_path=/nowhere", "/nowhere"),
    ],
)
def test_a_missing_file_is_an_error_before_anything_is_made(tmp_path, key, message):
    config = pyconfig.initialize(
        ["train.py", "configs/base.yml", f"base_output_directory={tmp_path}", key],
        reads_files=False,
    )
    with pytest.raises(UserError, match=message):
        training_run.open_for_training(config)
    assert list(tmp_path.iterdir()) == []
