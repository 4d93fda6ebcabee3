import gzip
import json

import pytest

from slimrank.errors import DataError, MissingExtraError
from slimrank.text.files import file_rows
from slimrank.text.sources import demo_documents, read_documents, read_source


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


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("a.jsonl", b'{"text": "one"}\n"caf\xc3\xa9"\n', ["one", "caf\u00e9"]),
        ("a.json", b'["one", "two"]', ["one", "two"]),
        ("a.txt", b"one\n", ["one\n"]),
        ("a.jsonl", '\ufeff"one"\n"two"'.encode("utf-16-le"), ["one", "two"]),
    ],
)
def test_compressed_files(tmp_path, name, content, texts, suffix):
    pyarrow = pytest.importorskip("pyarrow")
    packed = gzip.compress(content) if suffix == ".gz" else pyarrow.compress(content, "zstd", asbytes=True)
    path = tmp_path / (name + suffix)
    path.write_bytes(packed)
    assert read_documents(path, "calibration") == texts
    if name == "a.txt":
        path.write_bytes(packed + packed)  # members one after the other, as `cat` joins them
        assert read_documents(path, "calibration") == [2 * texts[0]]
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read_documents(path, "calibration")


def test_a_byte_that_is_not_utf8_is_found_in_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'"one"\n"caf\xe9"\n')
    with pytest.raises(DataError, match="byte 10 is 0xe9"):
        read_documents(tmp_path / "a.jsonl", "calibration")


def test_lines_are_read_one_by_one(tmp_path):
    """A broken line at the end is not looked at before the rows before it are taken."""
    (tmp_path / "a.jsonl").write_text('"one"\n"two"\n{oops')
    rows = file_rows(tmp_path / "a.jsonl")
    assert [next(rows)[1], next(rows)[1]] == ["one", "two"]
    with pytest.raises(DataError, match="line 3"):
        next(rows)


def test_of_a_large_text_a_random_sample_calibrates(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(f'"{i:04}"\n' for i in range(2000)))
    monkeypatch.setattr("slimrank.text.sources.MOST_CHARACTERS", 4 * 500)
    notes = []
    found = read_documents(tmp_path / "a.jsonl", "calibration", notes.append)
    numbers = [int(text) for text in found]
    assert len(numbers) == 500
    assert numbers == sorted(set(numbers))
    assert abs(sum(numbers) / 500 - 999.5) < 4 * 577 / 500**0.5  # four standard errors
    assert "a random sample of 500 of its 2,000 documents is used, 2,000 of 8,000 characters" in notes[0]
    assert found == read_documents(tmp_path / "a.jsonl", "calibration")
    for use in ("evaluation", "training"):
        assert len(read_documents(tmp_path / "a.jsonl", use)) == 2000


def test_one_document_is_never_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("slimrank.text.sources.MOST_CHARACTERS", 3)
    (tmp_path / "a.txt").write_text("a long text")
    assert read_documents(tmp_path / "a.txt", "calibration") == ["a long text"]


def test_a_folder_and_a_list(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "c.bin").write_text("ignored")
    assert read_source(tmp_path, "calibration") == "one\n\ntwo"
    assert read_source(["one", "two"], "calibration") == "one\n\ntwo"


def test_a_folder_as_the_hub_lays_it_out(tmp_path):
    for name in (".cache/x.txt", "._a.txt", "data/b.TXT", "data/en/a.jsonl", "dataset_infos.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('"one"' if name.endswith("jsonl") else name)
    notes = []
    assert read_source(tmp_path, "calibration", notes.append) == "data/b.TXT\n\none"
    assert [note.split(": ", 1)[1] for note in notes] == ["1 .json files in the folder were not read"]
    (tmp_path / "data" / "test-00000-of-00001.jsonl").write_text('"two"')
    (tmp_path / "data" / "train-00000-of-00001.jsonl").write_text('"three"')
    assert read_source(tmp_path, "calibration", notes.append) == "data/b.TXT\n\none\n\ntwo\n\nthree"
    assert notes[-1].endswith("all splits in the folder were read: test, train")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(tmp_path, name, encoding):
    content = "one é\r\n" if name == "a.txt" else json.dumps("one é\r\n", ensure_ascii=False)
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert read_source(tmp_path / name, "calibration") == "one é\r\n"


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf16_without_a_mark_names_its_byte_order(tmp_path, order):
    (tmp_path / "a.txt").write_bytes("one two".encode(f"utf-16-{order}"))
    with pytest.raises(DataError, match=f"iconv -f UTF-16{order.upper()}"):
        read_source(tmp_path / "a.txt", "calibration")


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "one"}\n{"text": "two"}\n',
        '[{"text": "one"}, {"text": "two"}]',
        '[\n"one",\n"two"\n]',
        '"one\\n\\ntwo"',
    ],
)
def test_json_as_lines_and_as_one_document(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "A.JSON.GZ").write_bytes(gzip.compress(content.encode()))
    for name in ("a.json", "A.JSON.GZ"):
        assert read_source(tmp_path / name, "calibration") == "one\n\ntwo"
    (tmp_path / "A.JSON.GZ").write_bytes(gzip.compress(content.encode())[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_source(tmp_path / "A.JSON.GZ", "calibration")


def test_rows_without_text_are_skipped_and_noted(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", None, None, "two"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('"one"\n\n{"text": null}\nnull\n"two"\n')
    for name, first in (("a.parquet", "row 2 of"), ("a.jsonl", "line 3 of")):
        notes = []
        assert read_source(tmp_path / name, "evaluation", notes.append) == "one\n\ntwo"
        assert len(notes) == 1
        assert f"2 rows without text (null) were skipped, the first is {first}" in notes[0]


def test_half_characters_are_replaced_and_noted(tmp_path):
    (tmp_path / "a.jsonl").write_text('"a"\n"b \\ud83d c"\n"\\ud83d\\ude00"\n')
    for source in (tmp_path / "a.jsonl", ["a", "b \ud83d c", "\ud83d\ude00"]):
        notes = []
        assert read_source(source, "calibration", notes.append) == "a\n\nb \ufffd c\n\n\U0001f600"
        assert "half characters" in notes[0]
        assert "2 of" in notes[0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"text": [{"role": "user", "content": "hi"}]},
        [{"from": "human", "value": "hi"}],
    ],
)
def test_a_chat_is_refused_with_what_to_do(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="chat") as raised:
        read_source(tmp_path / "a.jsonl", "calibration")
    assert "apply_chat_template" in raised.value.hint


def test_text_in_the_place_of_a_name():
    for source in ("", "word " * 2000, "a\0b", "~nobody-of-that-name/a.txt"):
        with pytest.raises(DataError, match="does not exist") as raised:
            read_source(source, "calibration")
        assert "a list" in raised.value.hint
        assert len(raised.value.message) < 300


def test_the_two_demo_parts_do_not_overlap():
    calibration, evaluation = demo_documents("calibration"), demo_documents("evaluation")
    assert not set(calibration) & set(evaluation)
    paragraphs = {" ".join(p.split()) for text in evaluation for p in text.split("\n\n")}
    assert not [p for text in calibration for p in text.split("\n\n") if " ".join(p.split()) in paragraphs]
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
        ("a.jsonl", b"[" * 100_000, "line 1 of .* is not JSON: maximum recursion depth"),
        ("a.json", b"[" * 100_000, "line 1 of .* is not JSON: maximum recursion depth"),
        ("a.json", b"9" * 5000, "line 1 of .* is not JSON: Exceeds the limit"),
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
    with pytest.raises(DataError, match="is not a data set"):
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
