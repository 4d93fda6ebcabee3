"""The options of `evaluate`, `benchmark` and `compare`: keywords as before, unknown ones refused."""

from dataclasses import fields

import pytest

from slimrank import comparison
from slimrank.comparison.request import Measurement, MeasureOptions
from slimrank.evaluate.api import benchmark, evaluate, windows_of
from slimrank.evaluate.options import EvaluateOptions, Evaluation, Loading, LoadOptions


@pytest.mark.parametrize(
    "keywords, defaults", [(LoadOptions, Loading), (EvaluateOptions, Evaluation), (MeasureOptions, Measurement)]
)
def test_keywords_are_those_with_defaults(keywords, defaults):
    assert set(keywords.__annotations__) == {field.name for field in fields(defaults)}
    assert defaults() == defaults(**{field.name: field.default for field in fields(defaults)})


def test_unknown_options_are_refused():
    for call in (
        lambda: evaluate("demo", devise="cpu"),
        lambda: benchmark("demo", "demo", task=None),
        lambda: comparison.compare("demo", [], "out", window=2),
        lambda: windows_of("demo", "", None, None, windows=1, seq_len=2, most=3),
    ):
        with pytest.raises(TypeError, match=r"unexpected keyword argument '(devise|task|window|most)'"):
            call()
