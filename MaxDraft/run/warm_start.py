"""What a run that starts from an existing head takes from the head's folder, and when."""

from __future__ import annotations

from pathlib import Path

from MaxDraft import pyconfig
from MaxDraft.convert.heads.load import open_head
from MaxDraft.drafts.registry import drafter_class
from MaxDraft.pyconfig import Config
from MaxDraft.run.folder import has_begun


def with_captured_layers(config: Config) -> Config:
    """Returns the config with target_layer_ids filled from the head's config.json.

    Unchanged without load_parameters_path, or where target_layer_ids is set. A run that has begun
    has them in its own config.yml, so it goes on although the head's folder is gone.
    CheckpointError where the folder holds no such head.
    """
    if config.target_layer_ids or not config.load_parameters_path:
        return config
    if has_begun(config):
        layers = pyconfig.read_saved(config.run_directory)["target_layer_ids"]
    else:
        folder = Path(config.load_parameters_path).expanduser()
        layers = open_head(folder, drafter_class(config.drafter)).captured_layers or ()
    return Config(config.as_dict() | {"target_layer_ids": list(layers)})
