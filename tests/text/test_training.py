"""Windows to train on: packed without padding, of exact shares, with a mask of what is to be predicted."""

import json
from collections import Counter

import pytest
import torch
from test_chats import PLAIN, TALK, tokenizer_with

from helpers import byte_tokenizer, tiny_model
from slimrank.errors import DataError, RecipeError
from slimrank.text.self_sampling import sample_windows
from slimrank.text.sources import read_documents
from slimrank.text.templates import rendered
from slimrank.text.training import training_windows

BOS, EOS = 256, 257
DOCUMENTS = ["one", "two two", "three three three", "four" * 9]


def ids_of(text):
    return byte_tokenizer()(text)["input_ids"]


def documents_in(windows):
    """What lies between EOS tokens, joined over all windows."""
    return byte_tokenizer().decode(windows.ids.flatten()).split("</s>")


def test_packing_loses_no_token_and_adds_none_but_eos():
    """The windows are as long as the whole, so that its order is that of the stream."""
    length = sum(map(len, DOCUMENTS)) + len(DOCUMENTS)
    packed = training_windows(DOCUMENTS, byte_tokenizer(), length)
    assert packed.ids.shape == (1, length)
    assert packed.ids.dtype == torch.int64
    assert packed.mask.dtype == torch.bool
    assert bool(packed.mask.all())
    assert not packed.notes
    assert sorted(documents_in(packed)) == sorted([*DOCUMENTS, ""])
    assert documents_in(packed)[:-1] != DOCUMENTS  # in a random order


def test_windows_are_cut_from_the_stream_and_what_is_left_is_noted():
    wanted = Counter([*(i for text in DOCUMENTS for i in ids_of(text)), *[EOS] * 4])
    total = sum(wanted.values())
    for length in (2, 3, 7):
        packed = training_windows(DOCUMENTS, byte_tokenizer(), length)
        assert packed.ids.shape == (total // length, length)
        left = wanted - Counter(packed.ids.flatten().tolist())
        assert sum(left.values()) == total % length
        assert not Counter(packed.ids.flatten().tolist()) - wanted
        note = f"the last {total % length} tokens of the training text fill no window and are left out"
        assert packed.notes == ([note] if total % length else [])


def test_a_document_that_ends_with_eos_gets_no_second_one_and_an_empty_one_none():
    packed = training_windows(["ab</s>", "", "cd", "a</s>\n"], byte_tokenizer(), 3)
    assert sorted(packed.ids.tolist()) == sorted([ids_of("ab</s>"), ids_of("cd</s>"), ids_of("a</s>\n")])


def test_each_document_once_in_an_epoch_and_epochs_differ():
    names = [f"{n:03d}" for n in range(100)]
    packed = training_windows(names, byte_tokenizer(), 4, tokens=1010)
    assert packed.ids.shape == (252, 4)
    read = [text[:3] for text in byte_tokenizer().batch_decode(packed.ids)]
    assert sorted(read[:100]) == sorted(read[100:200]) == names
    assert read[:100] != read[100:200]
    assert len(set(read[200:])) == 52


def test_part_of_an_epoch_is_spread_over_a_long_document():
    text = "".join(f"{n:04d}" for n in range(1000))
    packed = training_windows([text], byte_tokenizer(), 4, tokens=400)
    starts = sorted(map(int, byte_tokenizer().batch_decode(packed.ids)))
    assert len(set(starts)) == 100
    assert starts[0] < 100
    assert starts[-1] > 900


def test_no_more_documents_are_tokenised_than_needed(monkeypatch):
    from slimrank.text import training

    seen = []
    monkeypatch.setattr(training, "tokenise", lambda text, _: seen.append(text) or torch.zeros(4, dtype=torch.long))
    training_windows(["x"] * 1000, byte_tokenizer(), 5, tokens=50)
    assert len(seen) == 10
    training_windows(["x"] * 4, byte_tokenizer(), 5, tokens=500)
    assert len(seen) == 14


def test_the_seed_decides():
    first, again, other = (training_windows(DOCUMENTS, byte_tokenizer(), 5, tokens=500, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.ids, other.ids)


def test_a_bos_begins_every_window_where_the_tokenizer_begins_a_text_with_it():
    packed = training_windows(DOCUMENTS, byte_tokenizer(bos=True), 5, tokens=100)
    assert packed.ids.shape == (20, 5)
    assert set(packed.ids[:, 0].tolist()) == {BOS}
    assert BOS not in packed.ids[:, 1:]
    assert not bool(packed.mask[:, 0].any())
    assert bool(packed.mask[:, 1:].all())


@pytest.fixture
def files(tmp_path):
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 500)
    rows = [{"messages": TALK}, {"instruction": "Add", "input": "1 + 1", "output": "2"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_mixture_has_exact_shares(files):
    packed = training_windows(f"{files}/a.txt:0.7,{files}/b.txt:0.3", byte_tokenizer(), 10, tokens=2009)
    found = [("a" if ids_of("a")[0] in row else "b") for row in packed.ids.tolist()]
    assert Counter(found) == {"a": 140, "b": 60}
    assert Counter(found[:20]) == {"a": 14, "b": 6}
    once = training_windows(f"{files}/a.txt,{files}/b.txt", byte_tokenizer(), 2)
    assert once.ids.numel() == 1002


def test_only_tokens_of_the_assistant_count_in_chats(files):
    tokenizer = tokenizer_with(PLAIN)
    texts = [rendered(chat, tokenizer) for chat in read_documents(files / "chats.jsonl", "training", chat=True)]
    packed = training_windows(files / "chats.jsonl", tokenizer, sum(len(ids_of(text)) for text in texts), chat=True)
    assert tokenizer.decode(packed.ids[0]) in ("".join(texts), "".join(reversed(texts)))  # each ends with an EOS
    counted = tokenizer.decode(packed.ids[packed.mask])
    assert sorted(counted.split("</s>")) == ["", "2", "Farewell", "Hello"]


def test_mask_of_a_mixture_of_chats_and_plain_text(files):
    mixture = f"{files}/a.txt:1,{files}/chats.jsonl:1"
    packed = training_windows(mixture, tokenizer_with(PLAIN), 30, tokens=180, chat=True)
    plain = (packed.ids == ids_of("a")[0]).float().mean(dim=1) > 0.9
    assert plain.tolist().count(True) == 3
    assert bool(packed.mask[plain].all())
    assert 0 < int(packed.mask[~plain].sum()) < packed.mask[~plain].numel() / 2


def test_the_eos_after_a_chat_does_not_count(files):
    no_eos = "{% for m in messages %}{{ m.content }}{% endfor %}"
    packed = training_windows(files / "chats.jsonl", tokenizer_with(no_eos), 5, tokens=60, chat=True)
    assert bool((packed.ids == EOS).any())
    assert not bool(packed.mask[packed.ids == EOS].any())


def test_the_model_may_write_all_or_a_part(files):
    model = tiny_model()

    def sampled(count, seq_len, seed):
        return sample_windows(model, byte_tokenizer(), count, seq_len, seed)

    alone = training_windows("self", byte_tokenizer(), 8, tokens=32, seed=5, sampled=sampled)
    assert torch.equal(alone.ids, sampled(4, 8, 5))
    assert bool(alone.mask.all())
    mixed = training_windows(f"self,{files}/a.txt", byte_tokenizer(), 8, tokens=64, sampled=sampled)
    assert (mixed.ids[:, 0] == BOS).tolist() == [True, False] * 4


@pytest.mark.parametrize(
    "source, options, error, message",
    [
        (["ab"], {}, DataError, "has 3 tokens; one window needs 10"),
        (["ab"], {"tokens": 100}, DataError, "has 3 tokens; one window needs 10"),
        (["ab" * 9], {"tokens": 9}, RecipeError, "fewer than one window of 10"),
        ("self", {"tokens": 100}, RecipeError, "no model is given that writes the text 'self'"),
        ("self", {}, RecipeError, "text that the model writes has no end"),
        ("{0}/a.txt:2,{0}/b.txt:1", {}, RecipeError, "all text once leaves no choice of shares"),
        ("{0}/a.txt:99,{0}/b.txt:1", {"tokens": 100}, RecipeError, "b.txt' of the mixture has no share in 10 windows"),
        ("{0}/a.txt,{0}/c.txt", {"tokens": 100}, DataError, "c.txt' of the mixture: .* does not exist"),
        ("{0}/chats.jsonl", {}, DataError, "holds chats and no text column"),
        ("{0}/chats.jsonl", {"chat": True}, RecipeError, "the tokenizer has no chat template"),
    ],
)
def test_refusals(files, source, options, error, message):
    source = source.format(files) if isinstance(source, str) else source
    with pytest.raises(error, match=message):
        training_windows(source, byte_tokenizer(), 10, **options)


def test_chats_without_answers_and_unknown_options_are_refused(files):
    (files / "asked.jsonl").write_text(json.dumps({"messages": TALK[:2]}))
    with pytest.raises(DataError, match="no turn of the assistant"):
        training_windows(files / "asked.jsonl", tokenizer_with(PLAIN), 5, chat=True)
    with pytest.raises(TypeError):
        training_windows(["ab"], byte_tokenizer(), 2, colour="red")


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = tokenizer_with(None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        training_windows(["ab"], tokenizer, 2)
