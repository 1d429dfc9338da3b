"""Writes the golden files of the targets: what transformers computes for the models of recipe.py.

    python3 tests/goldens/make_goldens.py [NAME ...]  writes tests/goldens/NAME.npz
    python3 tests/goldens/make_goldens.py --report    compares MaxDraft with live models instead

A file holds `logits` [positions, V] and `features` [positions, 3, H] as float32, at the positions
of recipe.POSITIONS; as `config` the config.json text that transformers itself writes; as `tensors`
the checkpoint's names and shapes in JSON. The model runs in float64; transformers keeps rotary
angles, norms, routers and delta rules in float32 there as well.
Needs torch and transformers; the tests of the files need neither.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from goldens import recipe  # noqa: E402

# Checkpoints that name a family which transformers runs under another name.
ALIASES = {"kimi_k2": "deepseek_v3"}
# Files that hold all experts of a layer in one tensor, as transformers does in memory.
STACKED = ("qwen3_5_moe_multimodal",)
# The only implementation that knows soft caps or sinks.
EAGER = ("gemma2", "gpt_oss")


def transformers_config(config):
    from transformers import AutoConfig

    fields = {key: value for key, value in config.items() if key != "model_type"}
    model_type = config["model_type"]
    return AutoConfig.for_model(ALIASES.get(model_type, model_type), **fields)


def config_text(config):
    """config.json as transformers writes it, every field said."""
    written = json.loads(transformers_config(config).to_json_string(use_diff=False))
    return json.dumps(written | {"model_type": config["model_type"]}, indent=1)


def tensor_shapes(name):
    """{name: shape} of the files that people have: what save_pretrained writes."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = recipe.CONFIGS[name]
    kind = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    model = kind.from_config(transformers_config(config), dtype=torch.float32)
    if name in STACKED:
        return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / recipe.SINGLE, "numpy") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118


def transformers_model(name, folder):
    """The model of a checkpoint that recipe.write_checkpoint wrote, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # no slower at this size, and one order of summation
    config = recipe.CONFIGS[name]
    model, told = AutoModelForCausalLM.from_pretrained(
        folder,
        config=transformers_config(config),
        dtype=torch.float64,
        attn_implementation="eager" if config["model_type"] in EAGER else "sdpa",
        experts_implementation="eager",
        output_loading_info=True,
    )
    # A multimodal checkpoint's other towers are the only tensors that may be left over.
    towers = ("vision", "visual", "projector")
    told["unexpected_keys"] = {
        key for key in told["unexpected_keys"] if not any(tower in key for tower in towers)
    }
    assert not any(told.values()), told
    return model.eval()


@contextlib.contextmanager
def routing_gaps():
    """List that fills with [tokens] arrays: how far behind the last chosen the next one is.

    As a share of the last chosen's score: for a softmax that is the gap of the logits.
    """
    import torch

    topk, gaps = torch.topk, []

    def watched(scores, k, dim=-1, **options):
        if k < scores.shape[dim]:
            *_, last, behind = topk(scores, k + 1, dim).values.double().unbind(dim)
            gaps.append(((last - behind) / last.abs()).numpy())
        return topk(scores, k, dim, **options)

    torch.topk = watched
    try:
        yield gaps
    finally:
        torch.topk = topk


def expected(name, model):
    """logits [T, V] and features [T, 3, H] of one sequence, float64."""
    import torch

    captured = {}

    def keep(layer):
        def hook(module, inputs, output):
            captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    layers = getattr(model.model, "language_model", model.model).layers
    wanted = recipe.captured_layers(recipe.CONFIGS[name])
    hooks = [layers[layer].register_forward_hook(keep(layer)) for layer in wanted]
    tokens = torch.tensor(recipe.draw_tokens(name))[None]
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    features = []
    for layer in wanted:
        # The two names of one tensor: what layer i puts out is hidden_states[i + 1].
        assert torch.equal(captured[layer], out.hidden_states[layer + 1])
        features.append(captured[layer][0])
    return out.logits[0].double().numpy(), torch.stack(features, 1).double().numpy()


def write_file(name):
    config, shapes = recipe.CONFIGS[name], tensor_shapes(name)
    with tempfile.TemporaryDirectory() as folder, routing_gaps() as gaps:
        recipe.write_checkpoint(folder, config, shapes)
        logits, features = expected(name, transformers_model(name, folder))
    at = list(recipe.POSITIONS)
    np.savez_compressed(
        recipe.FOLDER / f"{name}.npz",
        logits=logits[at].astype(np.float32),
        features=features[at].astype(np.float32),
        config=np.array(config_text(config)),
        tensors=np.array(json.dumps(shapes)),
    )
    size = (recipe.FOLDER / f"{name}.npz").stat().st_size
    gap = f"{min(gap.min() for gap in gaps):.0e}" if gaps else "-"
    print(f"{name:28} {size / 1024:4.0f} KB  smallest routing gap {gap}")


def report():
    """A line per target: lines of its family's file, largest relative errors over all 1024
    positions of the logits and the three features, kinds of its layers and switches it has on.
    """
    import jax
    from goldens.switches import described
    from test_targets import errors_against, our_target

    from MaxDraft.targets.registry import FAMILIES, dims_from_config, text_config

    jax.config.update("jax_default_matmul_precision", "highest")
    errors = " ".join(f"{what:>9}" for what in ("logits", "feature 0", "1", "2"))
    print(f"{'':26} {'lines':>5} {'max |a-b| / max |b|':>39}\n{'':32} {errors}  switches")
    for name, config in recipe.CONFIGS.items():
        family = FAMILIES[text_config(config)["model_type"]]
        lines = len(Path(family.__file__).read_text().splitlines())
        with tempfile.TemporaryDirectory() as folder:
            recipe.write_checkpoint(folder, config, tensor_shapes(name))
            theirs = expected(name, transformers_model(name, folder))
            found = errors_against(our_target(name, folder), *theirs)
        errors = " ".join(f"{error:9.1e}" for error in found)
        print(f"{name:26} {lines:5} {errors}  {described(dims_from_config(config))}", flush=True)


if __name__ == "__main__":
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if "--report" in sys.argv[1:]:
        report()
    else:
        unknown = [name for name in sys.argv[1:] if name not in recipe.CONFIGS]
        if unknown:
            sys.exit(f"no target is called {unknown[0]}; there are {', '.join(recipe.CONFIGS)}")
        for family in sys.argv[1:] or recipe.CONFIGS:
            write_file(family)
