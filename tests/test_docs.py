"""README and docs say what is there: files, links, scripts, keys, flags, models."""

import os
import re
import shlex
from pathlib import Path

import pytest

from MaxDraft import pyconfig
from MaxDraft.config_keys import KEYS

ROOT = Path(__file__).resolve().parent.parent
PAPERS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MODELS = {path.stem for path in (ROOT / "configs" / "models").glob("*.yml")}
SHELL_BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def commands(path):
    """The shell commands of a document, lines that go on joined, comments and blanks left out."""
    for block in SHELL_BLOCK.findall(path.read_text(encoding="utf-8")):
        text = re.sub(r"\\\n\s*", " ", block)
        # A quoted value may go over several lines.
        pending = ""
        for line in text.splitlines():
            pending = f"{pending}\n{line}" if pending else line
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:
                continue
            pending = ""
            if words:
                yield words
        assert not pending, f"{path.name}: an open quote in {pending!r}"


ALL_COMMANDS = [(path.name, words) for path in PAPERS for words in commands(path)]


def test_there_are_commands_to_look_at():
    assert len(ALL_COMMANDS) > 20


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#]+?)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:MaxDraft|tests|end_to_end|configs)/[\w/.-]+\.\w+)`", text):
        if "NAME" not in name:
            assert (ROOT / name).exists(), name
    packages = "cost|run|drafts|decoding|targets|input_pipeline|convert|layers|report|tiny_target"
    for name in re.findall(rf"`((?:{packages})/[\w/]+\.py)`", text):
        assert (ROOT / "MaxDraft" / name).exists(), name


@pytest.mark.parametrize(("paper", "words"), ALL_COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_name_scripts_keys_and_models_that_exist(paper, words):
    scripts = [word for word in words if re.fullmatch(r"[\w/.]+\.(py|sh)", word)]
    for script in scripts:
        assert (ROOT / script).is_file() or script.startswith(".venv/"), script
    keys = dict(
        word.split("=", 1) for word in words if re.fullmatch(r"[a-z][a-z0-9_]*=.*", word, re.DOTALL)
    )
    if any(script.startswith("MaxDraft/") for script in scripts):
        assert keys.keys() <= KEYS.keys(), keys.keys() - KEYS.keys()
        assert keys.get("model_name", "default") in MODELS
        assert "configs/base.yml" in words or "--help" in words
        if words[-2:-1] == ["--help"]:
            assert words[-1] in KEYS


@pytest.mark.parametrize(
    "words",
    [words for _, words in ALL_COMMANDS if "MaxDraft/train.py" in words and "--help" not in words],
    ids=lambda words: " ".join(words)[:60],
)
def test_training_commands_are_accepted_by_the_configuration(words, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("M_")]:
        monkeypatch.delenv(name)
    start = words.index("MaxDraft/train.py")
    arguments = [word for word in words[start + 2 :] if "=" in word]
    config = pyconfig.initialize(
        ["train.py", str(ROOT / "configs" / "base.yml"), *arguments], reads_files=False
    )
    for argument in arguments:
        key, text = argument.split("=", 1)
        assert str(getattr(config, key)) == text


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_no_placeholder_is_left(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        assert not re.fullmatch(r"[A-Z_]{5,}", line.strip()), line
        assert not re.search(r"TODO|FIXME|XXX", line), line


def test_the_readme_lists_every_file_once():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1]
    folders, named = [], []
    for line in tree.splitlines():
        found = re.match(r"( *)([\w.-]+(?:/[\w.-]+)*/?)(\s|$)", line)
        if not found or line.startswith("```"):
            continue
        depth = len(found[1]) // 2
        folders[depth:] = [found[2].rstrip("/")]
        if found[2].endswith(".py"):
            named.append("/".join(folders))
    files = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "MaxDraft").rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert sorted(named) == sorted(files)
