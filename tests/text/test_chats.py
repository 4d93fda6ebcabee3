"""Instruction data: rows become chats, and the chat template of the tokenizer renders them."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import slimrank
from helpers import byte_tokenizer, text, tiny_model
from slimrank.cli.recipe_flags import recipe_flags
from slimrank.errors import DataError, RecipeError
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.text.chats import Chat
from slimrank.text.sources import read_documents, read_source
from slimrank.text.templates import assistant_tokens, rendered
from slimrank.text.texts import WindowRequest, read_texts

PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKING = (  # as in some published templates: a last turn has more before its content, and opens with a part of that
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell"},
]


def tokenizer_with(template):
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def read(tmp_path, *rows, name="a.jsonl", chat=True):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_documents(tmp_path / name, "training", chat=chat)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_messages_and_alpaca_rows_are_rendered_and_text_stays(tmp_path, name):
    rows = [
        {"messages": TALK[1:3], "text": "rendered otherwise"},
        {"instruction": "Add", "input": "1 + 1", "output": "2"},
        {"instruction": "Greet", "input": "", "output": "Hi"},
        {"instruction": "Greet", "output": "Hi", "text": "rendered otherwise"},
        {"text": "plain"},
        "string",
    ]
    tokenizer = tokenizer_with(PLAIN)
    assert [rendered(document, tokenizer) for document in read(tmp_path, *rows, name=name)] == [
        "<s>[user]Hi</s>[assistant]Hello</s>",
        "<s>[user]Add\n\n1 + 1</s>[assistant]2</s>",
        "<s>[user]Greet</s>[assistant]Hi</s>",
        "<s>[user]Greet</s>[assistant]Hi</s>",
        "plain",
        "string",
    ]


@pytest.mark.parametrize("column", ["conversations", "conversation"])
def test_rows_of_sharegpt(tmp_path, column):
    said = [("system", "Be brief"), ("human", "Hi"), ("gpt", "Hello"), ("function", "3"), ("Human", "Bye")]
    row = {column: [{"from": role, "value": text, "weight": None} for role, text in said], "text": "rendered otherwise"}
    (chat,) = read(tmp_path, row)
    roles = ("system", "user", "assistant", "tool", "user")
    assert chat.messages == tuple({"role": role, "content": text} for role, (_, text) in zip(roles, said, strict=True))
    (chat,) = read(tmp_path, {column: TALK})
    assert chat.messages == tuple(TALK)
    assert read(tmp_path, row, chat=False) == ["rendered otherwise"]


def test_the_notes_say_how_many_chats_there_were(tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{json.dumps({"messages": TALK})}\n"text"\n')
    notes = []
    read_documents(tmp_path / "a.jsonl", "calibration", notes.append, chat=True)
    assert "1 of its 2 documents are chats" in notes[0]


def test_without_chat_rows_behave_as_text(tmp_path):
    assert read(tmp_path, {"messages": TALK, "text": "plain"}, chat=False) == ["plain"]
    with pytest.raises(DataError, match="holds chats and no text column") as raised:
        read(tmp_path, {"messages": TALK}, chat=False)
    assert "--chat" in raised.value.hint
    with pytest.raises(DataError, match="no text column: instruction, output"):
        read(tmp_path, {"instruction": "Greet", "output": "Hi"}, chat=False)


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    calls = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "name": "x"}]
    pq.write_table(pa.table({"id": [1, 2], "messages": [calls, None]}), tmp_path / "a.parquet")
    notes = []
    (chat,) = read_documents(tmp_path / "a.parquet", "training", notes.append, chat=True)
    assert chat.messages == tuple(calls)  # the first message has no null name
    assert "1 rows without text (null) were skipped" in notes[0]
    pq.write_table(pa.table({"output": ["2"], "x": [1], "instruction": ["Add"]}), tmp_path / "b.parquet")
    (chat,) = read_documents(tmp_path / "b.parquet", "training", chat=True)
    assert [message["content"] for message in chat.messages] == ["Add", "2"]
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "c.parquet")
    assert read_documents(tmp_path / "c.parquet", "training", chat=True) == ["one"]


def test_a_hub_data_set_of_chats(monkeypatch):
    import types

    class Rows:
        column_names = ("id", "input", "instruction", "output")

        def __getitem__(self, column):
            return [f"{column} 1", f"{column} 2"]

    monkeypatch.setitem(
        __import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: Rows())
    )
    chats = read_documents("hub:org/set", "training", chat=True)
    assert [chat.messages[0]["content"] for chat in chats] == ["instruction 1\n\ninput 1", "instruction 2\n\ninput 2"]


def test_half_characters_in_chats_are_replaced_and_noted(tmp_path):
    notes = []
    (tmp_path / "a.jsonl").write_text('{"instruction": "a \\ud83d", "output": "b"}')
    (chat,) = read_documents(tmp_path / "a.jsonl", "training", notes.append, chat=True)
    assert chat.messages[0]["content"] == "a \ufffd"
    assert "half characters" in notes[0]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": []}, "'messages' is not a list of messages"),
        ({"messages": "Hi"}, "'messages' is not a list of messages"),
        ({"messages": [{"content": "Hi"}]}, "message 1 is not an object with a role"),
        ({"messages": [TALK[0], "Hi"]}, "message 2 is not an object with a role"),
        ({"instruction": 1, "output": "2"}, "'instruction' is a int"),
        ({"instruction": "a", "input": ["b"], "output": "2"}, "'input' is a list"),
        ({"conversations": [{"from": "alien", "value": "hi"}]}, "message 1 is from 'alien'"),
        ({"conversations": [{"from": "human", "content": "hi"}]}, "message 1 has no text under 'value'"),
        ({"conversations": "hi"}, "'conversations' is not a list of messages"),
        ({"chat": [{"role": "user", "content": "hi"}]}, "holds chats and no text column"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    with pytest.raises(DataError, match=f"line 2 of .*{message}"):
        read(tmp_path, "text", row)


def test_a_tokenizer_without_a_template_is_refused_with_what_to_do():
    with pytest.raises(RecipeError, match="the tokenizer has no chat template") as raised:
        rendered(Chat(tuple(TALK), "line 1"), byte_tokenizer())
    assert "leave out --chat" in raised.value.hint


def test_a_template_that_refuses_names_the_row():
    for template in ("{{ raise_exception('roles must alternate') }}", "{{ messages[0].content + 1 }}"):
        with pytest.raises(DataError, match="line 7: the chat template cannot render the chat"):
            rendered(Chat(tuple(TALK), "line 7"), tokenizer_with(template))


def counted(template, messages):
    """The tokens that count, joined; an _ for each that does not."""
    tokenizer = tokenizer_with(template)
    chat = Chat(tuple(messages), "line 1")
    ids, mask = assistant_tokens(chat, tokenizer)
    assert tokenizer.decode(ids) == rendered(chat, tokenizer)
    return "".join(
        tokenizer.decode([i]) if counts else "_" for i, counts in zip(ids.tolist(), mask.tolist(), strict=True)
    )


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_tokens_of_the_assistant_count(template):
    before, between = len("[system]Be brief.[user]Hi[assistant]") + 3, len("[user]Bye[assistant]") + 1
    assert counted(template, TALK) == "_" * before + "Hello</s>" + "_" * between + "Farewell</s>"
    assert set(counted(template, TALK[:2])) == {"_"}


def test_templates_that_render_a_last_turn_otherwise():
    first, second = len("[system]Be brief.\n[user]Hi\n[assistant]"), len("[user]Bye\n[assistant]<think>")
    assert counted(THINKING, TALK) == "_" * first + "Hello\n" + "_" * second + "</think>Farewell\n"
    forgets = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="renders message 3 otherwise where more messages follow") as raised:
        counted(forgets, TALK)
    assert "generation" in raised.value.hint


def test_a_token_over_the_end_of_the_prompt_counts():
    """A tokenizer that joins the last character of the opening with the first of the content."""
    made = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    made["model"]["vocab"]["]!"] = 259
    made["model"]["merges"] = [["]", "!"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = PLAIN
    ids, mask = assistant_tokens(Chat((TALK[1], {"role": "assistant", "content": "!Hello"}), "line 1"), tokenizer)
    assert ids[mask][0] == 259
    assert tokenizer.decode(ids[mask]) == "]!Hello</s>"


def test_calibration_is_that_of_chats_rendered_by_hand(tmp_path):
    """All tokens count; special tokens of the template become special tokens."""
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes " * n}] for n in range(1, 30)]
    tokenizer = tokenizer_with(PLAIN)
    by_hand = [{"text": tokenizer.apply_chat_template(chat, tokenize=False)} for chat in chats]
    for name, rows in (("chats", [{"messages": chat} for chat in chats]), ("texts", by_hand)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests = [WindowRequest("calibration", 6), WindowRequest("evaluation", 2, source="evaluation")]

    def windows(name, chat):
        source = str(tmp_path / f"{name}.jsonl")
        recipe = Recipe.make({
            "keep_ratio": 0.8, "calibration": source, "evaluation": source, "seq_len": 16, "chat": chat,
        })  # fmt: skip
        return read_texts(recipe, requests).tokenised(recipe, tiny_model(), tokenizer, Progress())

    chats, texts = windows("chats", True), windows("texts", False)
    assert all(torch.equal(chats[name], texts[name]) for name in ("calibration", "evaluation"))
    assert 257 in chats["calibration"]
    assert read_source(tmp_path / "texts.jsonl", "calibration").startswith("<s>[user]1?")


def test_compressing_on_a_mixture_with_chats(tmp_path):
    row = {"instruction": text(20), "output": text(20, seed=1)}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    (tmp_path / "b.txt").write_text(text(300))
    options = recipe_flags(calibration=f"{tmp_path}/a.jsonl:0.5,{tmp_path}/b.txt:0.5", chat=True)
    result = slimrank.compress(
        tiny_model(), tokenizer_with(PLAIN), keep_ratio=0.8, method="svd_llm", samples=4, seq_len=16, evaluation=None,
        **options,
    )  # fmt: skip
    assert result.report["provenance"]["recipe"]["chat"] is True
    (note,) = [note for note in result.report["notes"] if "chat" in note]
    assert "4 of its 4 documents are chats" in note
