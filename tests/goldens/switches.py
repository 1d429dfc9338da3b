"""The switches of a target: SWITCHES[name](dims) are its dimensions without one.

A switch is on where dropping it changes the dimensions. The report of make_goldens.py names those
that are on; test_targets.py drops them to see that a golden file notices.
"""

import dataclasses

from MaxDraft.targets.dims import MLA, Attention

_replace = dataclasses.replace


def _set(part, **fields):
    """The part with those of the fields that it has."""
    known = {field.name for field in dataclasses.fields(part)}
    return _replace(part, **{name: value for name, value in fields.items() if name in known})


def _dims(**fields):
    return lambda dims: _replace(dims, **fields)


def _layers(change):
    return lambda dims: _replace(dims, layers=tuple(change(layer) for layer in dims.layers))


def _mixers(change):
    return _layers(lambda layer: _replace(layer, mixer=change(layer.mixer)))


def _mixer(**fields):
    return _mixers(lambda mixer: _set(mixer, **fields))


def _ropes(change):
    def of(mixer):
        rope = getattr(mixer, "rope", None)
        return _replace(mixer, rope=change(rope, mixer)) if rope else mixer

    return _mixers(of)


def _rope(**fields):
    return _ropes(lambda rope, mixer: _replace(rope, **fields))


def _feed_forward(**fields):
    return _layers(lambda layer: _replace(layer, feed_forward=_set(layer.feed_forward, **fields)))


def _router(**fields):
    def change(layer):
        router = getattr(layer.feed_forward, "router", None)
        if router is None:
            return layer
        experts = _replace(layer.feed_forward, router=_replace(router, **fields))
        return _replace(layer, feed_forward=experts)

    return _layers(change)


def _plain_scale(mixer):
    if isinstance(mixer, MLA):
        return _replace(mixer, scale=(mixer.qk_nope_head_dim + mixer.qk_rope_head_dim) ** -0.5)
    return _set(mixer, scale=None)


def _whole_head(rope, mixer):
    return _replace(rope, rotary_dim=mixer.head_dim) if isinstance(mixer, Attention) else rope


def _one_rope(dims):
    return _mixer(rope=next(layer.mixer.rope for layer in dims.layers if _has_rope(layer)))(dims)


def _has_rope(layer):
    return getattr(layer.mixer, "rope", None) is not None


SWITCHES = {
    "window": _mixer(window=0),
    "chunk": _mixer(chunk=0),
    "score cap": _mixer(softcap=0.0),
    "score scale": _mixers(_plain_scale),
    "sinks": _mixer(sinks=False),
    "q/k norm": _mixer(qk_norm=""),
    "q/k l2 norm": _mixer(l2_norm=False),
    "temperature": _mixer(attn_temperature_tuning=None),
    "gated output": _mixer(gated=False),
    "q/k/v bias": _mixer(qkv_bias=False),
    "o bias": _mixer(output_bias=False),
    "latent bias": _mixer(bias=False),
    "rope scaling": _rope(rope_type="default"),
    "rope attention scaling": _rope(attention_scaling=1.0),
    "interleaved rope": _rope(interleaved=False),
    "partial rope": _ropes(_whole_head),
    "layers' own rope": _one_rope,  # or none at all
    "activation": _feed_forward(activation="silu"),
    "feed-forward bias": _feed_forward(bias=False),
    "weighed input": _feed_forward(apply_router_weight_on_input=False),
    "shared expert": _feed_forward(shared_intermediate_size=0, shared_gate=False),
    "shared gate": _feed_forward(shared_gate=False),
    "router scores": _router(scores="softmax"),
    "router bias": _router(bias=False),
    "selection bias": _router(selection_bias=False),
    "weights normed": _router(norm_topk_prob=False),
    "weight factor": _router(routed_scaling_factor=1.0),
    "expert groups": _router(n_group=1, topk_group=1),
    "sandwich norms": _layers(lambda layer: _replace(layer, post_norms=False)),
    "1 + w norms": _dims(norm_offset=0.0),
    "embedding scale": _dims(embed_scale=1.0),
    "logit cap": _dims(logit_softcap=0.0),
    "tied head": _dims(tied_head=False),
}


def switched_on(dims):
    """Names of the switches that these dimensions have on."""
    return [name for name, without in SWITCHES.items() if without(dims) != dims]


def described(dims):
    """Kinds of layers, then switches, as one line."""
    parts = [part for layer in dims.layers for part in (layer.mixer, layer.feed_forward)]
    kinds = dict.fromkeys(type(part).__name__ for part in parts)
    return ", ".join([*kinds, *switched_on(dims)])
