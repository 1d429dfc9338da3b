"""Prints what a mixture of experts multiplies, counted from its traced program.

    python3 end_to_end/report_moe_flops.py

k of E experts; "pairs" is what k experts of every token take, "all experts" what a loop over
experts with masks would. The router's product is counted apart: it is with all experts by nature.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # importing this file changes nothing
    # The repository's root, not this folder: no file in it may shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from MaxDraft.cost.mixture_flops import mixture_flops
from MaxDraft.errors import run_main

H, I = 2048, 768
EXPERTS = (8, 64, 256)
PLATFORMS = ("tpu", "cpu")


def main(argv: Sequence[str]) -> int:
    print(f"GFLOP of one mixture, H = {H}, I = {I}")
    print("  tokens    k    E  platform    counted      pairs  counted/pairs  all experts   router")
    for tokens, top_k in ((4096, 8), (4096, 4), (1, 8)):
        for num_experts in EXPERTS:
            for platform in PLATFORMS:
                experts, router = mixture_flops(H, I, num_experts, top_k, tokens, platform)
                pairs = 2 * 3 * H * I * tokens * top_k
                print(
                    f"{tokens:8} {top_k:4} {num_experts:4}  {platform:8} {experts / 1e9:10.3f} "
                    f"{pairs / 1e9:10.3f} {experts / pairs:14.3f} "
                    f"{pairs * num_experts / top_k / 1e9:12.3f} {router / 1e9:8.3f}"
                )
    return 0


if __name__ == "__main__":
    run_main(main)
