"""The captured layers of a run that starts from a head are those of the head, typed or not."""

import pytest
from config_helpers import init
from head_helpers import edit_config, exported

from MaxDraft import pyconfig, storage
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.run.warm_start import with_captured_layers


@pytest.fixture
def folder(tmp_path):
    return exported(tmp_path / "head", captured_layers=(2, 5, 9))[0]


def config_of(tmp_path, *arguments):
    return init("model_name=tiny", f"base_output_directory={tmp_path}", "run_name=r", *arguments)


def test_the_head_names_the_captured_layers(tmp_path, folder):
    config = with_captured_layers(config_of(tmp_path, f"load_parameters_path={folder}"))
    assert list(config.target_layer_ids) == [2, 5, 9]


def test_layers_that_are_typed_stay(tmp_path, folder):
    typed = config_of(tmp_path, f"load_parameters_path={folder}", "target_layer_ids=[1,2,3]")
    assert with_captured_layers(typed) == typed


def test_a_head_that_names_no_layers_leaves_the_defaults(tmp_path, folder):
    names = ("eagle_config", "eagle_aux_hidden_state_layer_ids")
    edit_config(folder, lambda config: [config.pop(name) for name in names])
    config = with_captured_layers(config_of(tmp_path, f"load_parameters_path={folder}"))
    assert list(config.target_layer_ids) == []


def test_a_run_that_has_begun_needs_no_head_folder(tmp_path, folder):
    config = with_captured_layers(config_of(tmp_path, f"load_parameters_path={folder}"))
    (config.run_directory / "checkpoints" / "4").mkdir(parents=True)
    config.write(config.run_directory / pyconfig.SAVED_NAME)
    again = config_of(tmp_path, f"load_parameters_path={folder}")
    storage.remove(folder)
    assert list(with_captured_layers(again).target_layer_ids) == [2, 5, 9]


def test_a_folder_without_a_head_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        with_captured_layers(config_of(tmp_path, f"load_parameters_path={tmp_path / 'gone'}"))
