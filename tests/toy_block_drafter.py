"""A block drafter that is as small as can be: what a second drafter needs of the house.

All K drafts of a position come from one pass. Two layers read keys and values of the fused hidden
states of two captured layers; the K slots of a block see each other; slots after the first read the
target's embedding of a mask token; the LM head is the target's, over its whole vocabulary.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from MaxDraft.drafts import alignment
from MaxDraft.drafts.drafter import Drafter
from MaxDraft.layers.attention import interval_attention, merge_own_keys
from MaxDraft.layers.params import Param

LAYERS = ("0", "1")
NUM_CAPTURED = 2


@dataclasses.dataclass(frozen=True)
class ToyDims:
    hidden_size: int
    num_heads: int
    block_size: int
    mask_token_id: int


@dataclasses.dataclass(frozen=True)
class ToyBlock(Drafter):
    dims: ToyDims
    kind = "toy_block"

    @classmethod
    def from_options(cls, options, target):
        return cls(ToyDims(target.hidden_size, 4, 4, target.vocab_size - 1))

    @classmethod
    def from_saved_dims(cls, saved):
        return cls(ToyDims(**saved))

    def saved_dims(self):
        return dataclasses.asdict(self.dims)

    @classmethod
    def captured_layers(cls, layer_ids, num_layers):
        return tuple(layer_ids) or (1, num_layers - 1)

    def params_table(self):
        H = self.dims.hidden_size

        def matrix(rows, name):
            return Param((rows, H), ("draft_embed", None), name)

        return {
            "fc": matrix(NUM_CAPTURED * H, "fc.weight"),
            "layers": {
                n: {name: matrix(H, f"layers.{n}.{name}") for name in ("q", "k", "v", "o")}
                for n in LAYERS
            },
        }

    draft_vocab_size = None
    trains_lm_head = False
    decode_functions = None

    @property
    def special_token_ids(self):
        return (self.dims.mask_token_id,)

    def num_steps(self, config):
        return self.dims.block_size - 1

    def loss_mask(self, turn_ids, segment_ids, config):
        return alignment.loss_mask(turn_ids, segment_ids, self.dims.block_size - 1, "serving")

    def step_weights(self, config):
        return np.asarray(self._decay(config))

    def loss_totals(self, in_vocab_loss_mask, config):
        """One number: the weighted positions of all steps together."""
        return (self._decay(config)[:, None] * in_vocab_loss_mask).sum()

    def loss_weights(self, in_vocab_loss_mask, totals, config):
        return self._decay(config)[:, None] * in_vocab_loss_mask / jnp.maximum(totals, 1.0)

    def _decay(self, config):
        return config.decay ** jnp.arange(self.dims.block_size - 1, dtype=jnp.float32)

    def heads(self, x):
        return x.reshape(*x.shape[:-1], self.dims.num_heads, -1)

    def per_token(self, params, inputs):
        fused = inputs.aux_hidden_states[None] @ params["fc"].astype(inputs.embeddings.dtype)
        keys_values = tuple(
            tuple(
                self.heads(fused @ params["layers"][n][name].astype(fused.dtype)) for name in "kv"
            )
            for n in LAYERS
        )
        return jnp.zeros_like(fused[0]), keys_values

    def slots(self, inputs, tokens, num_steps):
        """What the K slots of each block read, [R, K, H]: the given token, then masks."""
        mask = jnp.broadcast_to(
            inputs.special_embeddings, (len(tokens), num_steps - 1, self.dims.hidden_size)
        )
        given = jnp.take(inputs.embeddings, tokens, axis=0, mode="clip")
        return jnp.concatenate([given[:, None], mask], axis=1)

    def draft_block(self, params, state, keys, d_keys, inputs, positions, num_steps):
        x = self.slots(inputs, positions + 1, num_steps)
        starts = jnp.where(positions < 0, 0, inputs.document_starts[positions])
        R, K, H = x.shape
        # Every slot is a query of its own: [1, R * K, N, d].
        first, last = (jnp.repeat(y, K)[None] for y in (starts, positions))
        new_d_keys = []
        for number, n in enumerate(LAYERS):
            w = {name: p.astype(x.dtype) for name, p in params["layers"][n].items()}
            q = self.heads(x @ w["q"])
            out, logsumexp, d_layer = interval_attention(
                q.reshape(1, R * K, *q.shape[2:]),
                keys[number],
                None if d_keys is None else d_keys[number],
                first,
                last,
            )
            new_d_keys.append(d_layer)
            own_k, own_v = (
                jnp.swapaxes(self.heads(x @ w[name]), 0, 1)[:, :, None] for name in "kv"
            )  # [K, R, 1, N, d], seen by all slots of the block
            attended = merge_own_keys(
                out.reshape(q.shape), logsumexp.reshape(q.shape[:-1]), q, own_k, own_v
            )
            x = x + attended.reshape(R, K, H) @ w["o"]
        return jnp.swapaxes(x, 0, 1), None if d_keys is None else tuple(new_d_keys)

    def flops_per_token(self, ttt_length, length, supervised_share):
        return {}
