"""Opening a run's target says what of its config.json is not read."""

from config_helpers import init
from run_helpers import write_target

from MaxDraft.drafts.registry import drafter_class
from MaxDraft.run.target import open_target


def lines_of_opening(folder, capsys, **fields):
    """What opening a small target prints whose config.json has these fields too."""
    target = write_target(folder, **fields)
    config = init(f"target_path={target}", "max_target_length=64")
    open_target(config, drafter_class("eagle3"))
    return capsys.readouterr().out.splitlines()


def test_opening_a_target_names_the_fields_that_are_not_read(tmp_path, capsys):
    assert lines_of_opening(tmp_path / "plain", capsys) == []
    assert lines_of_opening(tmp_path / "odd", capsys, zork_norm=True, b_switch=False) == [
        "target: fields of config.json that are not read: b_switch, zork_norm"
    ]
