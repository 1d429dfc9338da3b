"""Which files a run reads, in which shares."""

import subprocess

import pytest
from data_helpers import record, write_lines

from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.file_spec import parse_file_spec

GOOD = record("Hello", "Hi")


def test_globs_give_sorted_files_and_no_weights(tmp_path):
    for name in ("b1.jsonl", "a2.jsonl", "a1.jsonl", "c,d.jsonl"):
        write_lines(tmp_path / name, [GOOD])
    (tmp_path / "a3.jsonl").mkdir()  # a folder is no file
    parts = parse_file_spec(f"{tmp_path}/a*.jsonl ; {tmp_path}/b1.jsonl; {tmp_path}/c,d.jsonl;")
    assert [[path.name for path in part.paths] for part in parts] == [
        ["a1.jsonl", "a2.jsonl"],
        ["b1.jsonl"],
        ["c,d.jsonl"],
    ]
    assert [part.weight for part in parts] == [None, None, None]


def test_weights_stand_behind_the_last_comma(tmp_path):
    for name in ("a.jsonl", "c,d.jsonl"):
        write_lines(tmp_path / name, [GOOD])
    parts = parse_file_spec(f"{tmp_path}/a.jsonl , 0.3;{tmp_path}/c,d.jsonl,0.7")
    assert [part.weight for part in parts] == [0.3, 0.7]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/x*.jsonl", "no file matches"),
        ("{}/a.jsonl,0", "the weight is 0, and must be above 0"),
        ("{}/a.jsonl,-1", "the weight is -1"),
        ("{}/a.jsonl,nan", "the weight is nan"),
        ("{}/a.jsonl,{}/a.jsonl", "is not a weight; write GLOB,WEIGHT"),
        ("{}/a.jsonl;{}/*.jsonl", "is in two parts of"),
        ("{}/a.jsonl,2", "a single part has all of it; leave the weight out"),
        ("{}/a.jsonl,2;{}/b.json", "gives weights to some of its parts"),
        ("{}", r"is a folder; name its files, .*/\*\.jsonl.*1 \*\.json"),
        ("{}/saved", r"is a folder that the datasets library saved"),
        ("~no-such-user/a.jsonl", "write the folder out"),
        (" ; ", "set grain_train_files"),
    ],
)
def test_a_wrong_specification_says_what_to_write(tmp_path, spec, message):
    write_lines(tmp_path / "a.jsonl", [GOOD])
    write_lines(tmp_path / "b.json", [GOOD])
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        parse_file_spec(spec.replace("{}", str(tmp_path)))


def test_the_command_for_a_saved_folder_quotes_its_name(tmp_path):
    folder = tmp_path / """it's a "saved" $HOME"""
    folder.mkdir()
    (folder / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(DataError) as error:
        parse_file_spec(str(folder))
    command = str(error.value).split("write it as JSON lines: ")[1]
    # Stands for the datasets library: prints what it is asked to read and to write.
    (tmp_path / "datasets.py").write_text(
        "class load_from_disk:\n"
        "    def __init__(self, path): print(path)\n"
        "    def to_json(self, path): print(path)\n"
    )
    ran = subprocess.run(
        ["sh", "-c", command], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.stdout.splitlines() == [str(folder), f"{folder.name}.jsonl"]
