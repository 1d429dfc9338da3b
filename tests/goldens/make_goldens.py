"""Writes the golden files of the targets: what transformers computes for the models of recipe.py.

    python3 tests/goldens/make_goldens.py            writes tests/goldens/<family>.npz
    python3 tests/goldens/make_goldens.py --report   compares MaxDraft with live models instead

A file holds `logits` [positions, V] and `features` [positions, 3, H] as float32, at the positions
of recipe.POSITIONS, and as `config` the config.json text that transformers itself writes. The model
runs in float64; transformers keeps rotary angles and norms in float32 there as well.
Needs torch and transformers; the tests of the files need neither.
"""

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from goldens import recipe  # noqa: E402


def transformers_model(config):
    """The family's model in float64, holding the recipe's weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)  # no slower at this size, and one order of summation
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **fields), attn_implementation="sdpa"
    )
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(recipe.draw(name, tuple(parameter.shape))))
    return model


def expected(model, config, tokens):
    """logits [T, V] and features [T, 3, H] of one sequence, float64."""
    import torch

    captured = {}

    def keep(layer):
        def hook(module, inputs, output):
            captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [
        model.model.layers[layer].register_forward_hook(keep(layer))
        for layer in recipe.captured_layers(config)
    ]
    with torch.no_grad():
        out = model(torch.tensor(tokens)[None], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    features = []
    for layer in recipe.captured_layers(config):
        # The two names of one tensor: what layer i puts out is hidden_states[i + 1].
        assert torch.equal(captured[layer], out.hidden_states[layer + 1])
        features.append(captured[layer][0])
    return out.logits[0].numpy(), torch.stack(features, 1).numpy()


def write_files():
    for family, config in recipe.CONFIGS.items():
        model = transformers_model(config)
        logits, features = expected(model, config, recipe.draw_tokens(config))
        at = list(recipe.POSITIONS)
        np.savez_compressed(
            recipe.FOLDER / f"{family}.npz",
            logits=logits[at].astype(np.float32),
            features=features[at].astype(np.float32),
            config=np.array(model.config.to_json_string(use_diff=False)),
        )
        print(f"{family}: {model.config.rope_parameters}")


def report():
    """Largest relative error over all 1024 positions, by family: logits and the three features."""
    import jax
    from test_targets import errors_against, our_target

    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"{'max |a-b| / max |b|':20} {'logits':>9} {'feature 0':>9} {'1':>9} {'2':>9}")
    for family, config in recipe.CONFIGS.items():
        model = transformers_model(config)
        theirs = expected(model, config, recipe.draw_tokens(config))
        errors = errors_against(our_target(model.config.to_dict()), *theirs)
        print(f"{family:20} " + " ".join(f"{error:9.1e}" for error in errors))


if __name__ == "__main__":
    report() if "--report" in sys.argv[1:] else write_files()
