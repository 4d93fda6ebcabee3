"""Chats as text to measure on."""

import json

import pytest

from helpers import byte_tokenizer, tiny_model
from slimrank.cli import main
from slimrank.errors import RecipeError
from slimrank.evaluate.api import evaluate

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TALK = [{"from": "human", "value": "What is a rank? " * 4}, {"from": "gpt", "value": "A number. " * 9}]


@pytest.fixture
def model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return tmp_path / "model"


def test_chats_are_rendered(model, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'conversations': TALK})}\n")
    rendered = f"[user] {TALK[0]['value']}\n[assistant] {TALK[1]['value']}\n"
    (tmp_path / "a.txt").write_text(rendered)
    found = {
        name: evaluate(model, [str(tmp_path / name)], 3, 24, chat=True, against=model) for name in ("a.jsonl", "a.txt")
    }
    digests = {record["texts"][str(tmp_path / name)]["tokens_sha256"] for name, record in found.items()}
    assert len(digests) == 1
    assert any("1 of its 1 documents are chats" in note for note in found["a.jsonl"]["notes"])
    assert any("no text holds any" in note for note in found["a.txt"]["notes"])
    with pytest.raises(SystemExit):
        main(["evaluate", str(model), "--text", str(tmp_path / "a.jsonl"), "--seq-len", "24", "--chat", "--json"])
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_without_a_template_chats_are_refused(tiny_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'conversations': TALK})}\n")
    with pytest.raises(RecipeError, match="no chat template"):
        evaluate(tiny_folder, [str(tmp_path / "a.jsonl")], 3, 24, chat=True)
