"""Writes a small random target of a family, in the files in which people have such a model.

    python3 end_to_end/make_target.py FAMILY FOLDER
    python3 end_to_end/make_target.py some/config.json FOLDER      (a small model of any family)

    FOLDER/target/                 config.json, generation_config.json, tokenizer, model.safetensors
    FOLDER/conversations.jsonl     what the tokenizer was trained on

DeepSeek-V3 and gpt-oss are quantized, as they are published; the rest is bfloat16. Of a config.json
the vocabulary is exchanged for the tokenizer's. What the weights are: MaxDraft/random_target/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # importing this file changes nothing
    # The repository's root, not this folder: no file in it may shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from MaxDraft.convert.safetensors_files import read_json
from MaxDraft.errors import run_main
from MaxDraft.random_target.configs import CONFIGS, with_tokenizer
from MaxDraft.random_target.files import write


def main(argv: Sequence[str]) -> int:
    if len(argv) != 3 or not (argv[1] in CONFIGS or argv[1].endswith(".json")):
        print(
            f"usage: make_target.py FAMILY FOLDER, where FAMILY is one of {', '.join(CONFIGS)} or "
            f"the config.json of a small model"
        )
        return 2
    config = CONFIGS.get(argv[1]) or with_tokenizer(read_json(Path(argv[1])))
    print(f"written: {write(config, Path(argv[2]))} and the conversations beside it")
    return 0


if __name__ == "__main__":
    run_main(main)
