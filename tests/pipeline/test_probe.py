"""Measuring a model: what is not finite says where, and memory is bounded."""

from itertools import pairwise

import pytest
import torch

from slimrank.cli.console import ConsoleProgress
from slimrank.errors import NonFiniteError
from slimrank.pipeline.stages import model_probe as probe
from slimrank.pipeline.stages.model_probe import _hook
from slimrank.store import Store
from test_allocation_end_to_end import SEARCH, SEQ_LEN, allocated


def test_what_is_not_finite_inside_a_block_names_the_cut(monkeypatch):
    from slimrank.pipeline.stages.spectrum_store import SpectrumStore

    real = SpectrumStore.layers

    def overflowing(self, unit, rank):
        layers = real(self, unit, rank)
        for layer in layers.values():
            layer.B.weight.data.mul_(float("inf") if "layers.1.mlp.down" in unit.path else 1.0)
        return layers

    monkeypatch.setattr(SpectrumStore, "layers", overflowing)
    name = r"model\.layers\.1\.mlp\.down_proj"
    with pytest.raises(NonFiniteError, match=rf"while '{name}' cut to rank \d+ was measured: NaN .* block"):
        allocated("lems")
    with pytest.raises(NonFiniteError, match="while a plan of the allocation was measured"):
        allocated("atp")


@pytest.mark.parametrize("id, method", [("fermigrad", "kfac_svd"), ("dobi", "svd_llm")])
def test_a_loss_that_is_not_finite_names_the_step(id, method, monkeypatch):
    real, calls = probe.next_token_loss, []

    def failing(*arguments):
        calls.append(1)
        return real(*arguments) * (1 if len(calls) < 4 else float("nan"))

    monkeypatch.setattr(probe, "next_token_loss", failing)
    with pytest.raises(NonFiniteError, match=r"step \d of \d of the descent"):
        allocated(id, method=method, allocation_options={"steps": 5})


def test_measurements_are_compared_and_stored_a_few_at_a_time(tmp_path, monkeypatch):
    whole = allocated("lems")
    groups, saved = [], []
    real, save = probe.ModelProbe._block, Store.save
    monkeypatch.setattr(probe, "MAX_HELD_BYTES", 2 * SEARCH * (SEQ_LEN // 2) * 32 * 4)  # two final states
    monkeypatch.setattr(
        probe.ModelProbe, "_block", lambda self, i, h, cuts: (groups.append(len(cuts)), real(self, i, h, cuts))[1]
    )
    monkeypatch.setattr(Store, "save", lambda self, name, *a: (saved.append(name), save(self, name, *a))[1])
    assert allocated("lems").plan == whole.plan
    assert groups == [2, 2, 2, 1] * 3
    assert saved.count("effects") == len(groups)


class Watched(ConsoleProgress):
    """Keeps what fraction was done after every event of the stage that allocates."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def stage(self, name, steps):
        super().stage(name, steps)
        self._see()

    def step(self, done=1):
        super().step(done)
        self._see()

    def _see(self):
        if self.current == "allocate":
            self.seen.append((self.fraction() * sum(self.costs.values()) - self.done_cost) / self.costs["allocate"])


@pytest.mark.parametrize("bias", [False, True])
def test_a_transform_sees_outputs_without_the_bias(bias):
    """A factored layer keeps its bias, so what a rank leaves of W x says nothing about it."""
    layer, x = torch.nn.Linear(3, 5, bias=bias), torch.ones(2, 3)
    layer.register_forward_hook(_hook(lambda given, output, rows: 2 * output, slice(0, 5)))
    torch.testing.assert_close(layer(x), 2 * x @ layer.weight.t() + (layer.bias if bias else 0))


@pytest.mark.parametrize(
    "id, options, most",
    [
        ("lems", {"search": True, "plans": 12}, 0.05),
        ("atp", {}, 0.1),
        ("ada_cr", {}, 0.5),
        ("fermigrad", {"steps": 12}, 0.1),
        ("dobi", {"steps": 12}, 0.1),
    ],
)
def test_the_time_left_follows_what_is_measured(id, options, most):
    """From nothing at the beginning, by small steps, to the end and not before."""
    progress = Watched()
    allocated(id, allocation_options=options, progress=progress)
    seen = progress.seen
    assert seen[0] == pytest.approx(0)
    assert seen[-1] == pytest.approx(1)
    steps = [after - before for before, after in pairwise(seen)]
    assert min(steps) >= 0
    assert steps[-1] > 0
    assert max(steps) < most + 1e-6
