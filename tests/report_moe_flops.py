"""Prints what a mixture of experts multiplies, counted from its traced program.

python3 tests/report_moe_flops.py

k = 8 of E experts; "pairs" is what 8 experts of every token take, "all experts" what a loop over
experts with masks would. The router's product is counted apart: it is with all experts by nature.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from MaxDraft.cost import traced_flops
from MaxDraft.layers.experts import Experts, Router, mixture, route

H, I = 2048, 768
EXPERTS = (8, 64, 256)
PLATFORMS = ("tpu", "cpu")


def counted(num_experts: int, top_k: int, tokens: int, platform: str) -> tuple[int, int]:
    """FLOPs of (experts, router)."""
    dims = Experts(num_experts, I, Router(top_k))

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    w = {
        "router": array(H, num_experts),
        "gate": array(num_experts, H, I),
        "up": array(num_experts, H, I),
        "down": array(num_experts, I, H),
    }
    x = array(tokens, H)
    router = traced_flops.count(lambda x, w: route(x, w, dims.router), x, w, platform=platform)
    return traced_flops.count(lambda x, w: mixture(x, w, dims), x, w, platform=platform) - router, (
        router
    )


def main() -> None:
    print(f"GFLOP of one mixture, H = {H}, I = {I}")
    print("  tokens    k    E  platform    counted      pairs  counted/pairs  all experts   router")
    for tokens, top_k in ((4096, 8), (4096, 4), (1, 8)):
        for num_experts in EXPERTS:
            for platform in PLATFORMS:
                experts, router = counted(num_experts, top_k, tokens, platform)
                pairs = 2 * 3 * H * I * tokens * top_k
                print(
                    f"{tokens:8} {top_k:4} {num_experts:4}  {platform:8} {experts / 1e9:10.3f} "
                    f"{pairs / 1e9:10.3f} {experts / pairs:14.3f} "
                    f"{pairs * num_experts / top_k / 1e9:12.3f} {router / 1e9:8.3f}"
                )


if __name__ == "__main__":
    main()
