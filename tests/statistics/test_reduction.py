"""Statistics that several processes have gathered are summed as one would have gathered them."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slimrank.processes import Processes
from slimrank.statistics.accumulators import ChannelSums, GramSum
from slimrank.statistics.layer_statistics import LayerStatistics
from slimrank.statistics.paired_inputs import StreamSums
from slimrank.statistics.reduction import summed
from slimrank.statistics.residual_gap import ResidualGap

CPU = torch.device("cpu")


class Table:
    """What threads that play processes lay down for one another."""

    def __init__(self, count):
        self.barrier, self.values = threading.Barrier(count), [None] * count


class Thread(Processes):
    """A process of a job, played by a thread."""

    def __init__(self, rank, count, table):
        super().__init__(rank, count)
        object.__setattr__(self, "table", table)

    def all(self, value):
        self.table.values[self.rank] = value
        self.table.barrier.wait()
        found = list(self.table.values)
        self.table.barrier.wait()
        return found

    def _reduced(self, tensor, operation):
        parts = torch.stack([part.clone() for part in self.all(tensor)])
        self.wait()
        return tensor.copy_(parts.sum(0) if operation == "SUM" else parts.amax(0))


def at_once(count, part_of):
    table = Table(count)
    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(summed, Thread(rank, count, table), part_of(rank), CPU) for rank in range(count)]
        return [job.result(timeout=20) for job in jobs]


def layer(rows, notes=()):
    """Statistics of a layer 3 x 4 over these inputs."""
    inputs, channels = GramSum.empty(4), ChannelSums.empty(4)
    inputs.add(rows), channels.add(rows)
    shape, needs = (3, 4), frozenset({"gram", "channels"})
    return LayerStatistics(shape, needs, inputs, channels=channels, rank=2, tokens=len(rows), notes=notes)


@pytest.mark.parametrize("count", [2, 3])
def test_sums_of_parts_are_those_of_the_whole(count):
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    parts = rows.tensor_split(count)
    for found in at_once(count, lambda rank: {"a": layer(parts[rank], (f"note {rank % 2}",))}):
        whole = layer(rows)
        torch.testing.assert_close(found["a"].gram, whole.gram, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["a"].channels.largest, whole.channels.largest)
        torch.testing.assert_close(found["a"].channels.absolute, whole.channels.absolute)
        assert (found["a"].tokens, found["a"].inputs.count, found["a"].channels.count) == (10, 10, 10)
        assert (found["a"].shape, found["a"].rank, found["a"].needs) == (whole.shape, whole.rank, whole.needs)
        assert found["a"].notes == ("note 0", "note 1")


def test_a_sum_that_layers_share_is_summed_once_and_still_shared():
    def part(rank):
        first = layer(torch.full((2, 4), 1.0 + rank))
        second = copy.copy(first)
        return {"q": first, "k": second}

    for found in at_once(2, part):
        assert found["q"].inputs is found["k"].inputs
        assert found["q"].channels is found["k"].channels
        torch.testing.assert_close(found["q"].gram, torch.full((4, 4), 10.0, dtype=torch.float64))


def test_a_layer_that_one_process_has_not_reached():
    for found in at_once(2, lambda rank: {"expert": layer(torch.ones(3, 4))} if rank else {}):
        assert list(found) == ["expert"]
        assert found["expert"].tokens == 3
        torch.testing.assert_close(found["expert"].gram, torch.full((4, 4), 3.0, dtype=torch.float64))


def test_sums_of_two_streams():
    draw = torch.Generator().manual_seed(1)
    x, z, e = (torch.randn(8, n, generator=draw) for n in (4, 4, 3))

    def streams(part):
        sums = StreamSums.empty(4, CPU, own=False)
        sums.add(x[part], z[part])
        return sums

    def gap(part):
        sums = ResidualGap.empty(3, 4, CPU)
        sums.add(e[part], x[part], z[part])
        return sums

    halves = [slice(0, 5), slice(5, 8)]
    for make in (streams, gap):
        whole = make(slice(None))
        for found in at_once(2, lambda rank, make=make: {"a": make(halves[rank])}):
            for name, value in vars(whole).items():
                mine = getattr(found["a"], name)
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-5)
    own = at_once(2, lambda rank: {"a": StreamSums.empty(4, CPU, own=True)})
    assert all(found["a"].inputs is found["a"].wanted and found["a"].cross is None for found in own)
