"""The folders of a run and of its export, checked before anything is trained."""

import pytest

from MaxDraft import pyconfig, storage
from MaxDraft.errors import UserError
from MaxDraft.run.folder import check_export_directory, make_run_directory


@pytest.fixture
def config(tmp_path):
    return pyconfig.initialize(
        [
            "train.py",
            "configs/base.yml",
            f"base_output_directory={tmp_path}",
            "run_name=r",
            f"export_path={tmp_path}/heads/x",
        ]
    )


def test_a_fresh_export_folder_is_accepted_and_leaves_nothing(config, tmp_path):
    check_export_directory(config)
    assert storage.files(tmp_path) == []


@pytest.mark.parametrize("what", ["a file", "other files"])
def test_an_export_folder_of_something_else_is_refused(config, what):
    folder = config.export_directory
    storage.write_text(folder if what == "a file" else folder / "thesis.tex", "mine")
    with pytest.raises(UserError, match="export_path"):
        check_export_directory(config)


@pytest.mark.parametrize("key", ["export_path", "base_output_directory"])
def test_a_folder_below_a_file_is_refused(config, tmp_path, key):
    (tmp_path / "file").write_text("")
    config = pyconfig.Config(config.as_dict() | {key: str(tmp_path / "file" / "x")})
    check = check_export_directory if key == "export_path" else make_run_directory
    with pytest.raises(UserError, match=f"another {key}"):
        check(config)
