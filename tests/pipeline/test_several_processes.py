"""Several processes compress a model as one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes_job
import pytest
import torch
from safetensors.torch import load_file

from slimrank.errors import RecipeError
from slimrank.pipeline.sharing import my_numbers, my_units
from slimrank.processes import Processes, by_leader, processes

JOB = Path(processes_job.__file__)


def started(folder, count, names=None):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(JOB)]
    command = [*launch, str(folder), *([] if names is None else [json.dumps(names)])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(JOB.parent)])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(job):
    output, errors = job.communicate(timeout=120)
    return job.returncode, output + errors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process makes, and what two make."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    job = started(two, 2)
    processes_job.run(one)
    code, output = ended(job)
    assert code == 0, output[-3000:]
    return one, two


def products(folder):
    """The product of the factors of each layer, or its other tensors."""
    tensors = load_file(folder / "model.safetensors")
    found = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
    for a in [name for name in found if name.endswith(".A.weight")]:
        b = a.replace(".A.weight", ".B.weight")
        found[a.replace(".A.weight", "")] = found.pop(b) @ found.pop(a)
    return found


@pytest.mark.parametrize("name", processes_job.JOBS)
def test_the_result_is_that_of_one_process(folders, name):
    one, two = (folder / name for folder in folders)
    plans = [json.loads((folder / "plan.json").read_text())["targets"] for folder in (one, two)]
    assert plans[0] == plans[1]
    mine, theirs = products(one), products(two)
    assert mine.keys() == theirs.keys()
    for layer, product in mine.items():
        scale = float(product.abs().max()) or 1.0
        assert float((theirs[layer] - product).abs().max()) <= 1e-5 * scale, layer


def test_the_report_says_how_many_shared_the_work(folders):
    one, two = (json.loads((folder / "whole text" / "report.json").read_text())["notes"] for folder in folders)
    added = [note for note in two if note not in one]
    assert added[0] == "2 processes shared the work"
    assert "each process read all calibration text" in added[1]
    assert not [path for path in folders[1].iterdir() if path.name.endswith(".run")]


def test_a_process_that_dies_ends_all_and_other_processes_resume(folders, tmp_path):
    """Two processes are interrupted; three go on with what was stored."""
    job = started(tmp_path, 2, ["refined"])
    store = tmp_path / "refined.run" / "store"
    until = time.monotonic() + 60
    while time.monotonic() < until and not list(store.glob("*/block-*.safetensors")):
        time.sleep(0.02)
    victims = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(victims[-1]), signal.SIGKILL)
    code, _ = ended(job)
    if code == 0:
        pytest.skip("the compression was faster than the signal")
    assert list(store.glob("*/block-*.safetensors"))
    code, output = ended(started(tmp_path, 3, ["refined"]))
    assert code == 0, output[-3000:]
    mine, theirs = products(folders[0] / "refined"), products(tmp_path / "refined")
    assert all(torch.allclose(theirs[name], mine[name], rtol=1e-5, atol=1e-5) for name in mine)


def test_fewer_batches_than_processes_are_refused():
    with pytest.raises(RecipeError, match="3 processes cannot share 2 batches"):
        my_numbers(Processes(0, 3), [None, None])
    assert my_numbers(Processes(2, 3), []) == range(0)


@pytest.mark.parametrize(("items", "count"), [(7, 2), (3, 3), (10, 4)])
def test_every_item_has_one_process(items, count):
    parts = [Processes(rank, count).mine(range(items)) for rank in range(count)]
    assert [item for part in parts for item in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_costly_units_are_spread():
    class Unit:
        def __init__(self, *shape):
            self.shape = shape

    units = [Unit(8, 8), Unit(16, 32), Unit(16, 32), Unit(16, 16)]
    shares = [my_units(units, Processes(rank, 2)) for rank in range(2)]
    assert sorted(map(id, shares[0] + shares[1])) == sorted(map(id, units))
    assert all(units[1:3].count(unit) <= 1 for share in shares for unit in share)
    assert [sum(unit in share for unit in units[1:3]) for share in shares] == [1, 1]


def test_one_process_waits_for_nobody():
    team = processes()
    assert (team.rank, team.count, team.leader) == (0, 1, True)
    assert by_leader(lambda: 3) == 3
    assert team.collect({"a": torch.ones(1)}).keys() == {"a"}
