"""Several processes compress a model as one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import processes_job
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


def weights_and_plan(folder, name):
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
        return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118


def farthest(mine, theirs):
    """The largest difference of two sets of weights, over the largest weight of its layer."""
    assert mine.keys() == theirs.keys()
    return max(float((theirs[path] - weight).abs().max() / weight.abs().max()) for path, weight in mine.items())


@pytest.mark.parametrize("name", processes_job.JOBS)
def test_the_result_is_that_of_one_process(folders, name):
    (one, about), (two, again) = (weights_and_plan(folder, name) for folder in folders)
    assert about["plan"] == again["plan"]
    assert farthest(one, two) <= 1e-5


def test_the_report_says_how_many_shared_the_work(folders):
    one, two = (weights_and_plan(folder, processes_job.WRITTEN)[1]["notes"] for folder in folders)
    added = [note for note in two if note not in one]
    assert added[0] == "2 processes shared the work"
    assert "each process read all calibration text" in added[1]


def test_the_leader_writes_the_model(folders):
    one, two = (load_file(folder / "out" / "model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    assert not list(folders[1].glob("out.*"))


def test_a_process_that_dies_ends_all_and_other_processes_resume(folders, tmp_path):
    """Two processes are interrupted; one goes on with what was stored."""
    job = started(tmp_path, 2, ["refined"])
    store = tmp_path / "runs" / "refined" / "store"
    until = time.monotonic() + 60
    while time.monotonic() < until and not list(store.glob("*/block-*.safetensors")):
        time.sleep(0.02)
    victims = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(victims[-1]), signal.SIGKILL)
    code, _ = ended(job)
    if code == 0:
        pytest.skip("the compression was faster than the signal")
    assert list(store.glob("*/block-*.safetensors"))
    processes_job.run(tmp_path, ["refined"])
    assert farthest(weights_and_plan(folders[0], "refined")[0], weights_and_plan(tmp_path, "refined")[0]) <= 1e-5


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
