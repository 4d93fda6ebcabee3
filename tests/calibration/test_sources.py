import json

import pytest

from slimrank.calibration.sources import demo_documents, read_source
from slimrank.errors import DataError, MissingExtraError


def test_a_txt_file_is_read_exactly(tmp_path):
    path = tmp_path / "a.txt"
    content = "one\r\n\n  two é\n"
    path.write_bytes(content.encode())
    assert read_source(path, "calibration") == content


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "o\u2028ne"}\n\n"two"\r\n', encoding="utf-8")
    assert read_source(path, "calibration") == "o\u2028ne\n\ntwo"


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2], "content": ["one", "two"]}), path)
    assert read_source(path, "calibration") == "one\n\ntwo"
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a readable parquet"):
        read_source(path, "calibration")


def test_a_folder_and_a_list(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "c.bin").write_text("ignored")
    assert read_source(tmp_path, "calibration") == "one\n\ntwo"
    assert read_source(["one", "two"], "calibration") == "one\n\ntwo"


def test_the_two_demo_parts_do_not_overlap():
    calibration, evaluation = demo_documents("calibration"), demo_documents("evaluation")
    assert not set(calibration) & set(evaluation)
    assert len("".join(calibration)) > 200_000
    assert len("".join(evaluation)) > 50_000
    assert read_source("demo", "evaluation") == "\n\n".join(evaluation)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9"),
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b'{"text": 1}', "holds a int"),
        ("a.jsonl", b'{"words": "x"}', "no text column: words"),
        ("a.jsonl", b"{oops", "line 1 of .* is not JSON"),
        ("a.jsonl", b"[1]", "neither a string nor an object"),
        ("a.pdf", b"x", "cannot read text"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_source(tmp_path / name, "calibration")


def test_missing_sources(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        read_source(tmp_path / "no.txt", "calibration")
    with pytest.raises(DataError, match="holds no text"):
        read_source(tmp_path, "calibration")
    with pytest.raises(DataError, match="is no data set"):
        read_source("hub:", "calibration")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"slimrank\[data\]"):
        read_source("hub:some/set", "calibration")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(MissingExtraError, match="pyarrow"):
        read_source(tmp_path / "x.parquet", "calibration")


def test_a_hub_data_set(monkeypatch):
    import types

    asked = {}

    class Rows:
        column_names = ("id", "text")

        def __getitem__(self, column):
            return ["one", "two"]

    def load_dataset(name, config, split, trust_remote_code):
        assert trust_remote_code is False  # datasets before 4 would ask, or run code of the repository
        asked.update(name=name, config=config, split=split)
        if name == "broken/set":
            raise RuntimeError("offline\nmore")
        return Rows()

    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_source("hub:org/set:config:test", "calibration") == "one\n\ntwo"
    assert asked == {"name": "org/set", "config": "config", "split": "test"}
    read_source("hub:org/set", "calibration")
    assert asked == {"name": "org/set", "config": None, "split": "train"}
    with pytest.raises(DataError, match="cannot be loaded: offline"):
        read_source("hub:broken/set", "calibration")
    assert json.dumps(asked)
