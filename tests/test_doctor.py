"""The doctor on machines that are not there: packages, extras, devices, disks and caches are all faked."""

import importlib
import json
import re
import shutil
import socket
import sys
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import slimrank
from helpers import save_tiny
from slimrank import doctor
from slimrank.cli import main
from slimrank.doctor import packages
from slimrank.doctor.hardware import _container_limit
from slimrank.doctor.room import _memory
from slimrank.errors import MissingExtraError, ModelError
from slimrank.pipeline.forecast import LIBRARIES
from slimrank.recipe import Recipe

importlib.import_module("slimrank.report.build")  # has its own versions before a test fakes them
ROOT = Path(__file__).parent.parent
REQUIRES = [
    "torch>=2.6", "PyYAML>=6", "pywin32>=1; sys_platform == 'nowhere'",
    "gguf>=0.17; extra == 'demo'", "datasets>=3; extra == 'data'", "pyarrow>=15; extra == 'data'",
]  # fmt: skip
FOUND = {"torch": "2.13.0+cpu", "PyYAML": "6.0.3", "gguf": "0.19.0", "datasets": "5.2.0", "pyarrow": "20.0"}
GB = 10**9


def installed(monkeypatch, **found):
    """A slimrank of REQUIRES, and versions of packages; None is not installed."""
    versions = {**FOUND, **found}
    about = Message()
    about["Requires-Python"] = ">=3.10"
    for extra in ("data", "demo"):
        about["Provides-Extra"] = extra

    def version(name):
        if versions[name] is None:
            raise packages.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages.metadata, "metadata", lambda _: about)
    monkeypatch.setattr(packages.metadata, "requires", lambda _: REQUIRES)
    monkeypatch.setattr(packages.metadata, "version", version)


def free_disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def free_memory(monkeypatch, free, total=10**15):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total, available=free))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Everything is there and large; no network."""

    def never(*_):
        raise AssertionError("the doctor uses no network")

    installed(monkeypatch)
    free_disk(monkeypatch, 10**15)
    free_memory(monkeypatch, 10**15)
    monkeypatch.setattr("slimrank.doctor.hardware._container_limit", lambda: float("inf"))
    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setenv("SLIMRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def messages(record):
    return " ".join(problem["message"] for problem in record["problems"])


def test_all_is_well(machine):
    record = doctor.diagnose()
    assert record["ok"]
    assert [p["name"] for p in record["packages"]] == ["Python", "torch", "PyYAML"]
    assert [e["missing"] for e in record["extras"]] == [[], []]
    assert {d["what"] for d in record["disks"]} == {
        "output", "run directory", "cache of slimrank", "cache of the hub",
    }  # fmt: skip


@pytest.mark.parametrize(
    "found, message",
    [
        ({"torch": "2.5.1"}, "torch 2.5.1; slimrank needs >=2.6"),
        ({"torch": "2.6.0rc1"}, "torch 2.6.0rc1"),
        ({"PyYAML": None}, "PyYAML is missing; slimrank needs >=6"),
    ],
)
def test_a_package_that_is_old_or_missing(machine, found, message):
    installed(machine, **found)
    record = doctor.diagnose()
    assert not record["ok"]
    assert message in messages(record)


def test_a_python_that_is_too_old(machine):
    machine.setattr("platform.python_version", lambda: "3.9.18")
    assert "Python 3.9.18; slimrank needs >=3.10" in messages(doctor.diagnose())


def test_missing_extras_are_no_problem(machine):
    installed(machine, gguf=None, pyarrow="14.0")
    record = doctor.diagnose()
    assert record["ok"]
    assert [(e["name"], e["missing"]) for e in record["extras"]] == [("data", ["pyarrow"]), ("demo", ["gguf"])]
    assert all(e["disables"] for e in record["extras"])


def test_slimrank_that_is_not_installed(machine):
    def absent(name):
        raise packages.metadata.PackageNotFoundError(name)

    machine.setattr(packages.metadata, "metadata", absent)
    record = doctor.diagnose()
    assert "not installed" in messages(record)
    assert record["packages"] == record["extras"] == []


@pytest.mark.parametrize("name", doctor.IMPORTED)
def test_a_package_that_does_not_import(machine, tiny_folder, name):
    machine.setitem(sys.modules, name, None)
    record = doctor.diagnose(tiny_folder)
    assert f"{name} cannot be imported" in messages(record)
    assert record["model"] is None
    assert record["disks"]


def test_every_extra_of_the_project_is_in_the_table():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert set(re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE)) == set(packages.DISABLES)


# room -----------------------------------------------------------------------------------------------------------


def test_the_needs_of_a_model_are_those_of_the_plan(machine, tiny_folder):
    recipe = Recipe(keep_ratio=0.6, method="svd_llm", samples=8, seq_len=24)
    record, plan = doctor.diagnose(tiny_folder, recipe, "out"), slimrank.preview(tiny_folder, recipe)
    assert record["ok"]
    assert record["model"]["memory"] == {"cpu": plan["peak_memory"]}
    needed = {d["what"]: d["needed"] for d in record["disks"]}
    assert needed == {
        "output": plan["size"]["bytes_after"], "run directory": plan["run_bytes"],
        "cache of slimrank": 0, "cache of the hub": 0,
    }  # fmt: skip
    most = doctor.diagnose(tiny_folder)["model"]
    assert most["bytes_after"] == most["bytes_before"] > record["model"]["bytes_after"]


def test_places_on_one_disk_share_it(machine, tmp_path):
    places = {"output": (tmp_path / "a" / "b", 60), "run directory": (tmp_path, 60), "cache": (tmp_path, 0)}
    for free, ok in ((119, False), (120, True)):
        free_disk(machine, free)
        problems = []
        rows = doctor.disks(places, problems)
        assert [row["needed"] for row in rows] == [60, 60, 0]
        assert not problems if ok else "output and run directory" in problems[0].message


def test_little_disk_and_little_memory(machine, tiny_folder):
    free_disk(machine, 1000)
    free_memory(machine, LIBRARIES)
    said = messages(doctor.diagnose(tiny_folder))
    assert "output and run directory" in said
    assert "memory of cpu" in said


@pytest.mark.parametrize("out", ["~no-such-user/out", "x" * 300])
def test_a_place_that_no_disk_allows(machine, tiny_folder, out):
    record = doctor.diagnose(tiny_folder, out=out)
    assert "cannot be used (output)" in messages(record)
    assert not record["ok"]


def test_a_folder_that_cannot_be_written(machine, tiny_folder):
    machine.setattr("os.access", lambda *_: False)
    assert doctor.diagnose()["ok"]
    assert "cannot be written (output)" in messages(doctor.diagnose(tiny_folder))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "svd_llm"},
        {"method": "svd_llm", "refine": "update"},
        {"method": "kfac_svd", "corrections": 2, "correction_windows": 2},
        {"method": "kfac_svd", "resident": True},
        {"method": "basis_sharing", "refine": "update"},
        {"method": "svd_llm", "form": "pivot", "corrections": 1, "correction_windows": 2},
    ],
    ids=str,
)
def test_the_run_directory_is_foretold_as_compress_asks_for_it(options, tiny_folder, text_file, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("slimrank.pipeline.compression.need_space", lambda path, needed: asked.append(needed))
    small = {"samples": 4, "search_samples": 4, "seq_len": 24, "batch_size": 2, "evaluation": None, "keep_ratio": 0.6}
    chosen = {**small, **options, "calibration": str(text_file)}
    slimrank.compress(tiny_folder, out=tmp_path / "out", run_dir=tmp_path / "run", **chosen)
    assert asked[0] == slimrank.preview(tiny_folder, **chosen)["run_bytes"]
    stored = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*.safetensors"))
    assert stored < 2 * asked[0] + 200_000  # headers weigh much here


def test_the_limit_of_a_container(tmp_path):
    assert _container_limit(tmp_path) == float("inf")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("77\n")
    assert _container_limit(tmp_path) == 77
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_limit(tmp_path) == 77
    (tmp_path / "memory.max").write_text("55\n")
    assert _container_limit(tmp_path) == 55


def test_memory_is_that_of_the_container(machine):
    machine.setattr("slimrank.doctor.hardware._container_limit", lambda: 3 * GB)
    cpu = doctor.diagnose()["devices"][0]
    assert (cpu["memory"], cpu["free"], cpu["threads"]) == (3 * GB, 3 * GB, torch.get_num_threads())


# models in caches -----------------------------------------------------------------------------------------------


def in_the_hub_cache(tmp_path, *names):
    """A snapshot of org/name that holds these files of a tiny model."""
    home = tmp_path / "hub" / "models--org--name"
    source, snapshot = save_tiny(tmp_path / "tiny"), home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    for name in names:
        shutil.copy(source / name, snapshot / name)
    return snapshot


def test_a_model_of_which_only_the_configuration_is_here(machine, tmp_path):
    in_the_hub_cache(tmp_path, "config.json")
    record = doctor.diagnose("org/name")
    assert not record["model"]["cached"]
    assert record["disks"][-1]["needed"] == record["model"]["bytes_before"] > 0


def test_a_model_in_the_cache(machine, tmp_path):
    snapshot = in_the_hub_cache(tmp_path, "config.json", "model.safetensors")
    assert doctor.diagnose("org/name")["model"]["cached"]
    index = {"weight_map": {"a": "part.safetensors", "b": "other.safetensors"}}
    (snapshot / "model.safetensors").rename(snapshot / "part.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not doctor.diagnose("org/name")["model"]["cached"]


@pytest.mark.parametrize("model", ["org/name", "demo", "/no/model", "a/b/c"])
def test_a_model_that_is_not_here_is_a_problem_and_nothing_is_fetched(machine, model):
    record = doctor.diagnose(model)
    assert record["model"] is None
    assert model in messages(record)
    assert all(p["hint"] for p in record["problems"])


def test_a_compressed_model_is_a_problem(machine, tiny_folder, tmp_path):
    slimrank.compress(tiny_folder, out=tmp_path / "out", keep_ratio=0.6, method="svd", evaluation=None)
    assert "already compressed" in messages(doctor.diagnose(tmp_path / "out"))


@pytest.mark.parametrize("work", [slimrank.load, lambda path: slimrank.preview(path, keep_ratio=0.8)])
def test_a_gguf_file_without_its_extra_and_one_that_is_cut_off(machine, tmp_path, work):
    def without(*_, **__):
        raise ImportError("Please install gguf")

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot be loaded"):
        work(tmp_path / "model.gguf")
    machine.setattr("transformers.AutoConfig.from_pretrained", without)
    machine.setattr("transformers.AutoTokenizer.from_pretrained", without)
    with pytest.raises(MissingExtraError, match="gguf"):
        work(tmp_path / "model.gguf")


# accelerators ---------------------------------------------------------------------------------------------------


class Cuda:
    """Stands for torch.cuda or torch.xpu."""

    def mem_get_info(self, device):
        return (20 + device.index) * GB, 80 * GB

    def get_device_name(self, device):
        return "card"

    def device(self, device):
        return torch.no_grad()

    def is_bf16_supported(self, including_emulation):
        return not including_emulation


class Mps:
    """Stands for torch.mps: nothing to ask about bfloat16, and no place to try it here."""

    def recommended_max_memory(self):
        return 16 * GB

    def driver_allocated_memory(self):
        return GB


def accelerated(monkeypatch, kind, count, module):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)


def test_every_accelerator_is_listed(machine):
    accelerated(machine, "cuda", 2, Cuda())
    rows = doctor.devices()[1:]
    assert [(r["device"], r["free"], r["memory"]) for r in rows] == [
        ("cuda:0", 20 * GB, 80 * GB), ("cuda:1", 21 * GB, 80 * GB),
    ]  # fmt: skip
    assert all(r["bfloat16"] and r["name"] == "card" for r in rows)
    accelerated(machine, "mps", 1, Mps())
    assert doctor.devices()[1] == {
        "device": "mps:0", "name": "mps", "memory": 16 * GB, "free": 15 * GB, "bfloat16": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options, whole", [({}, True), ({"evaluation": None}, False), ({"evaluation": None, "resident": True}, True)]
)
def test_an_accelerator_holds_all_weights_only_where_it_runs_the_whole_model(options, whole):
    record = {"peak_memory": LIBRARIES + 30, "size": {"bytes_loaded": 10}}
    found = _memory(record, Recipe(keep_ratio=0.8, **options), "cuda")
    assert found == {"cpu": LIBRARIES + 10, "cuda": 30 if whole else 20}


# the command ----------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *map(str, arguments)])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_the_command_shows_everything(machine, capsys, tiny_folder):
    code, shown, _ = run(capsys, tiny_folder, "--keep", 0.5)
    assert code == 0
    for words in ("torch", ">=2.6", "devices", "cpu", "run directory", "memory: about", "everything that is needed"):
        assert words in shown
    installed(machine, torch="2.5", gguf=None)
    code, shown, _ = run(capsys)
    assert code == 1
    assert "problem: torch 2.5" in shown
    assert "try: pip install" in shown


def test_the_command_as_json(machine, capsys, tiny_folder):
    code, shown, _ = run(capsys, tiny_folder, "--keep", 0.5, "--json")
    assert code == 0
    assert json.loads(shown)["model"]["parameters"] > 0
    free_disk(machine, 1)
    code, shown, _ = run(capsys, tiny_folder, "--keep", 0.5, "--json")
    assert code == 1
    assert not json.loads(shown)["ok"]


def test_options_without_a_model_are_refused(machine, capsys):
    code, _, error = run(capsys, "--keep", 0.8)
    assert code == 1
    assert "keep_ratio" in error
