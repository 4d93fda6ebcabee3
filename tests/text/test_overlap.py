import pytest
import torch

from slimrank.text import overlap
from slimrank.text.overlap import windows_found

TEXT = torch.randint(1000, (5000,), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(1000, (640,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("at_once", [2**20, 100])
def test_windows_are_found_wherever_they_begin(monkeypatch, at_once):
    monkeypatch.setattr(overlap, "_AT_ONCE", at_once)
    windows = torch.stack([TEXT[:64], TEXT[1777:1841], TEXT[-64:], OTHER[:64]])
    assert windows_found(windows, TEXT).tolist() == [True, True, True, False]
    drawn = torch.stack([TEXT[1770:1870], OTHER[100:200]])
    assert windows_found(windows, drawn).tolist() == [False, True, False, False]


def test_half_a_window_counts_less_does_not():
    half, less = (torch.cat([TEXT[:n], OTHER[: 128 - n]])[None] for n in (64, 63))
    assert windows_found(half, TEXT).tolist() == [True]
    assert windows_found(less, TEXT).tolist() == [False]


def test_short_windows_say_nothing():
    assert windows_found(TEXT[:15][None], TEXT).tolist() == [False]
    assert windows_found(TEXT[:16][None], TEXT).tolist() == [True]
    assert windows_found(TEXT[:64][None], TEXT[:31]).tolist() == [False]
