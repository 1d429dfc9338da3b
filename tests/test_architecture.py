"""The packages of MaxDraft: who may import whom."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "MaxDraft"

# Each package may import itself, and what stands after it in its line.
MAY_IMPORT = {
    "layers": {"errors", "sharding"},
    "targets": {"errors", "layers", "sharding"},
    "drafts": {"errors", "layers", "sharding", "storage", "targets"},
    "input_pipeline": {"errors", "storage", "strict_json"},
    "convert": {"errors", "layers", "sharding", "storage", "strict_json", "targets", "drafts"},
    "decoding": {"errors", "layers", "sharding", "targets", "drafts"},
    "cost": {"errors", "layers", "sharding", "targets", "drafts"},
    "random_target": {
        "errors",
        "layers",
        "storage",
        "targets",
        "convert",
        "drafts",
        "tiny_target",
    },
    "report": set(),
    "tiny_target": {"errors", "layers", "sharding", "storage", "targets", "convert"},
}
# These stand above these packages and wire them together.
WIRING = {"run"}


def imports(path: Path) -> set[str]:
    """Packages and modules of MaxDraft that a file imports, "" for MaxDraft itself left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("MaxDraft.")}
    return found


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_import_downwards_only(package):
    files = sorted((PACKAGE / package).rglob("*.py"))
    assert files
    for path in files:
        assert imports(path) <= MAY_IMPORT[package] | {package}, path


def test_every_package_is_listed():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert packages == set(MAY_IMPORT) | WIRING


def test_no_drafter_is_named_outside_its_package():
    kinds = {path.parent.name for path in (PACKAGE / "drafts").glob("*/drafter.py")}
    assert kinds
    for path in sorted(PACKAGE.rglob("*.py")):
        if (PACKAGE / "drafts") not in path.parents:
            text = path.read_text(encoding="utf-8")
            assert not [kind for kind in kinds if f"drafts.{kind}" in text], path


def test_the_input_pipeline_and_pyconfig_know_no_devices():
    code = "import sys; import MaxDraft.pyconfig; assert 'jax' not in sys.modules, 'pyconfig';"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for path in sorted((PACKAGE / "input_pipeline").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = itertools.chain.from_iterable(
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        )
        assert not [name for name in names if name.split(".")[0] == "jax"], path


def test_one_module_reads_the_environment():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "config_layers.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert "os.environ" not in text and "os.getenv" not in text, path


@pytest.mark.parametrize("order", [["check"], ["format", "--check"]])
def test_the_linter_and_the_formatter_have_nothing_to_say(order):
    ruff = [sys.executable, "-m", "ruff", *order, "--no-cache", str(ROOT)]
    said = subprocess.run(ruff, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


def test_tests_and_end_to_end_scripts_do_not_import_each_other():
    folders = [ROOT / "tests", ROOT / "end_to_end"]
    names = [{path.stem for path in folder.rglob("*.py")} for folder in folders]
    for folder, others in zip(folders, reversed(names), strict=True):
        for path in sorted(folder.rglob("*.py")):
            modules = set()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    modules.add((node.module or "").split(".")[0])
                elif isinstance(node, ast.Import):
                    modules |= {alias.name.split(".")[0] for alias in node.names}
            assert not modules & others, path
