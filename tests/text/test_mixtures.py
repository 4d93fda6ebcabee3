"""Mixtures of text sources: their notation, their shares, and the windows that calibrate."""

import json
from collections import Counter

import pytest
import torch

from helpers import byte_tokenizer, tiny_model
from slimrank.errors import DataError, RecipeError
from slimrank.pipeline.prepare import Choices
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.text.mixtures import Part, interleaved, parts_of, shares
from slimrank.text.texts import NO_CHATS, WindowRequest, read_texts


@pytest.mark.parametrize(
    "source, parts",
    [
        ("a.txt:0.7,b.jsonl:0.3", [("a.txt", 0.7), ("b.jsonl", 0.3)]),
        ("a.txt, b.jsonl", [("a.txt", None), ("b.jsonl", None)]),
        ("hub:org/set:config:train:2,self:1", [("hub:org/set:config:train", 2.0), ("self", 1.0)]),
        ("hub:org/set,demo", [("hub:org/set", None), ("demo", None)]),
        ("hub:org/set:2024", [("hub:org/set:2024", None)]),
        (r"C:\a.txt:3,D:\b.txt:.5", [(r"C:\a.txt", 3.0), (r"D:\b.txt", 0.5)]),
        (r"C:\a.txt,D:\b.txt", [(r"C:\a.txt", None), (r"D:\b.txt", None)]),
        (r"C:\a.txt", [(r"C:\a.txt", None)]),
        ("a.txt:1.0", [("a.txt", 1.0)]),
        ("demo", [("demo", None)]),
        ("a:b.txt,c", [("a:b.txt", None), ("c", None)]),
    ],
)
def test_the_notation(source, parts):
    assert parts_of(source) == [Part(*part) for part in parts]


def test_names_that_exist_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt:1,b.txt:2", "x,y.txt", "z:0.5"):
        (tmp_path / name).write_text("words")
    assert parts_of("a.txt:1,b.txt:2") == [Part("a.txt:1,b.txt:2")]
    assert parts_of("x,y.txt:3,z:0.5:1") == [Part("x,y.txt", 3.0), Part("z:0.5", 1.0)]
    assert parts_of("q,x,y.txt,z:0.5") == [Part("q"), Part("x,y.txt"), Part("z:0.5")]
    assert parts_of(["a,b", "c"]) == [Part(["a,b", "c"])]
    assert parts_of(tmp_path / "x,w") == [Part(tmp_path / "x,w")]


@pytest.mark.parametrize(
    "source, message",
    [
        ("a.txt:0,b.txt:1", "the weight 0 .* is not a positive number"),
        ("a.txt:-1,b.txt:1", "the weight -1"),
        ("a.txt:1e999,b.txt:1", "the weight 1e999"),
        ("a.txt:0.5,b.txt", "some parts .* have a weight and some have none"),
        ("a.txt,,b.txt", "has an empty part"),
        ("a.txt,", "has an empty part"),
        ("a.txt:1,a.txt:2", "names 'a.txt' twice"),
    ],
)
def test_what_is_no_mixture(source, message):
    with pytest.raises(RecipeError, match=message):
        parts_of(source)


@pytest.mark.parametrize(
    "count, weights, expected",
    [
        (10, (0.7, 0.3), [7, 3]),
        (16, (0.7, 0.3), [11, 5]),
        (100, (0.29, 0.71), [29, 71]),
        (3, (None, None), [2, 1]),
        (10, (1, 1, 1), [4, 3, 3]),
        (7, (2, 4, 1), [2, 4, 1]),
        (0, (1, 2), [0, 0]),
    ],
)
def test_shares_by_largest_remainder(count, weights, expected):
    assert shares(count, [Part("x", weight) for weight in weights]) == expected


def test_the_first_of_interleaved_windows_have_the_shares():
    joined = interleaved([torch.zeros(75, 1), torch.ones(25, 1)])
    assert all(abs(float(joined[:n].sum()) - n / 4) <= 1 for n in range(101))


@pytest.fixture
def files(tmp_path):
    """Texts of one letter each, so that every window says where it comes from."""
    for letter in "abc":
        (tmp_path / f"{letter}.txt").write_text(letter * 2000)
    return tmp_path


def texts_of(requests, tokenizer=None, **options):
    recipe = Recipe.make({"keep_ratio": 0.8, "seq_len": 16, "evaluation": None, **options})
    return read_texts(recipe, requests).tokenised(recipe, tiny_model(), tokenizer or byte_tokenizer(), Progress())


def letters(windows):
    assert bool((windows == windows[:, :1]).all())  # a window has one source
    return Counter(byte_tokenizer().decode(windows[:, 0]))


REQUESTS = [
    WindowRequest("calibration", 10),
    WindowRequest("search", 8, disjoint=True),
    WindowRequest("refinement", 40, spread=True),
]


def test_every_use_has_the_exact_shares(files):
    texts = texts_of(REQUESTS, calibration=f"{files}/a.txt:0.5,{files}/b.txt:0.3,{files}/c.txt:0.2")
    assert letters(texts["calibration"]) == {"a": 5, "b": 3, "c": 2}
    assert letters(texts["search"]) == {"a": 4, "b": 2, "c": 2}
    assert letters(texts["refinement"]) == {"a": 20, "b": 12, "c": 8}
    assert not texts.notes


def test_the_seed_decides_and_parts_have_places_of_their_own(tmp_path):
    numbers = " ".join(f"{n:05d}" for n in range(3000))
    (tmp_path / "a.txt").write_text(numbers)
    (tmp_path / "b.txt").write_text(numbers.replace("0", "x"))
    mixture = f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    first, again, other = (texts_of(REQUESTS, calibration=mixture, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[r.name], again[r.name]) for r in REQUESTS)
    assert not torch.equal(first["calibration"], other["calibration"])
    decoded = byte_tokenizer().batch_decode(first["calibration"])
    assert decoded[1::2] != [text.replace("0", "x") for text in decoded[::2]]


def test_a_mixture_of_one_part_is_that_part(files):
    alone, mixed = (texts_of(REQUESTS, calibration=f"{files}/a.txt{weight}") for weight in ("", ":1.0"))
    assert all(torch.equal(alone[r.name], mixed[r.name]) for r in REQUESTS)


def test_the_model_may_write_a_part(files):
    texts = texts_of(REQUESTS, calibration=f"self:1,{files}/a.txt:1")
    own = texts["calibration"][:, 0] == 256  # windows of the model begin with a BOS
    assert int(own.sum()) == 5
    assert letters(texts["calibration"][~own]) == {"a": 5}
    assert len(texts["search"]) == 8
    alone = texts_of([WindowRequest("calibration", 5)], calibration="self")
    assert torch.equal(texts["calibration"][own], alone["calibration"])


def test_evaluation_windows_are_found_in_any_part(files):
    requests = [REQUESTS[0], WindowRequest("evaluation", 4, source="evaluation")]
    mixture = f"{files}/a.txt,{files}/b.txt"
    found = [texts_of(requests, calibration=mixture, evaluation=f"{files}/{x}.txt").overlap for x in "abc"]
    assert [bool(overlap) for overlap in found] == [True, True, False]


def test_errors_name_the_part(files):
    (files / "short.txt").write_text("words")
    with pytest.raises(DataError, match=r"the part '.*short.txt' of the mixture: the text has 5 tokens"):
        texts_of(REQUESTS, calibration=f"{files}/a.txt,{files}/short.txt")
    with pytest.raises(DataError, match=r"the part '.*none.txt' of the mixture: .* does not exist"):
        texts_of(REQUESTS, calibration=f"{files}/a.txt,{files}/none.txt")
    with pytest.raises(RecipeError, match=r"the part '.*b.txt' of the mixture has no share in 10 windows"):
        texts_of(REQUESTS, calibration=f"{files}/a.txt:99,{files}/b.txt:1")


def test_chats_that_are_asked_for_and_missing_are_noted(files):
    assert NO_CHATS in texts_of(REQUESTS[:1], calibration=f"{files}/a.txt", chat=True).notes
    assert not texts_of([], calibration=f"{files}/a.txt", chat=True).notes


def test_stages_ask_for_windows_of_a_mixture(files):
    recipe = Recipe.make({"keep_ratio": 0.8, "method": "svd_llm", "calibration": f"{files}/a.txt,{files}/b.txt"})
    assert [request.name for request in Choices.of(recipe).requests if request.source == "calibration"]
    assert json.dumps(recipe.described()["calibration"]).count(".txt") == 2
