"""Every command of docs/performance.md is one that the benchmark understands."""

import re
import subprocess
from pathlib import Path

import pytest

from MaxDraft import benchmark, pyconfig
from MaxDraft.run.synthetic_step import target_dims

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


def commands(block):
    """The arguments of each call of Python in a block, as bash splits them."""
    script = block.replace(".venv/bin/python3", "call").replace("bash ", "true ")
    script = r"""call() { printf '%s\0' "$@"; printf '\1'; }""" + "\n" + script
    ran = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    return [call.split("\0")[:-1] for call in ran.stdout.split("\1")[:-1]]


@pytest.mark.parametrize("block", BLOCKS)
def test_commands_name_flags_keys_and_models_that_exist(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    calls = commands(block)
    assert calls or "gpu_check.sh" in block
    for program, *arguments in calls:
        assert program == "MaxDraft/benchmark.py"
        flags, keys = benchmark.parse([program, *arguments])
        compare = flags.compare or []
        replaced = {other.split("=")[0] for other in compare}
        unchanged = [key for key in keys if key.split("=")[0] not in replaced]
        for variant in (keys, [*unchanged, *compare]):
            config = pyconfig.initialize([program, *variant], reads_files=False)
            assert target_dims(config).num_layers > 0


def test_scripts_that_the_page_names_exist():
    for script in re.findall(r"bash (\S+\.sh)", PAGE):
        assert (ROOT / script).is_file()
