"""Uploading, against a small hub on this machine that records what it is asked."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from fake_hub import Repo, serving
from huggingface_hub import ModelCard, constants

import slimrank
from helpers import save_tiny
from slimrank.cli import main
from slimrank.errors import HubError, ModelError, OutputError, RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub asks for it
CARD = "---\nlicense: apache-2.0\nlanguage: [en, de]\n---\nhello\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A compressed model whose original has a licence."""
    folder = tmp_path_factory.mktemp("hub")
    base = save_tiny(folder / "base")
    (base / "README.md").write_text(CARD)
    slimrank.compress(base, keep_ratio=0.6, method="svd", evaluation=None, out=folder / "out")
    return folder / "out"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "smaller")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield hub


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_our_files_go_up_and_no_other(folder, hub):
    (folder / "diary.txt").write_text("private")
    (folder / "optimizer.pt").write_text("private")
    expected = files_of(folder)
    assert slimrank.push(folder, "me/small") == f"{hub.url}/me/small/commit/abc"
    there = hub.repos["me/small"].branches["main"]
    card = there.pop("README.md").decode()
    assert 'from_pretrained("me/small")' in card
    assert "this-folder-or-its-hub-id" not in card
    assert there == {
        ".gitattributes": b"",
        **{
            name: content
            for name, content in expected.items()
            if name not in ("diary.txt", "optimizer.pt", "README.md")
        },
    }
    assert hub.repos["me/small"].private is False
    assert files_of(folder) == expected


def test_the_requests_of_an_upload(folder, hub):
    slimrank.push(folder, "org/small", private=True)
    kinds = [(method, path.rpartition("/")[0] or path) for method, path in hub.writes()]
    assert kinds[0] == ("POST", "/api/repos")
    assert kinds[-1] == ("POST", "/api/models/org/small/commit")
    (asked,) = hub.asked("POST", "/repos/create")
    assert (asked["organization"], asked["name"]) == ("org", "small")
    assert hub.repos["org/small"].private
    (lines,) = hub.asked("POST", "/commit/main")
    assert lines[0]["value"]["summary"].startswith("slimrank ")
    large = [line["value"]["path"] for line in lines if line["key"] == "lfsFile"]
    assert large == ["model.safetensors"]


def test_what_an_earlier_upload_left_goes(folder, hub):
    slimrank.push(folder, "me/small")
    branch = hub.repos["me/small"].branches["main"]
    manifest = json.loads(branch["slimrank.json"])
    for name in ("model-00001-of-00002.safetensors", "diary.txt"):
        branch[name] = b"old"
    manifest["files"]["model-00001-of-00002.safetensors"] = {"bytes": 3, "sha256": "0"}
    branch["slimrank.json"] = json.dumps(manifest).encode()
    slimrank.push(folder, "me/small")
    names = set(hub.repos["me/small"].branches["main"])
    assert "model-00001-of-00002.safetensors" not in names
    assert {"diary.txt", "model.safetensors"} <= names


def test_a_branch_is_made_and_a_pull_request_opened(folder, hub):
    hub.repos["me/small"] = Repo()
    slimrank.push(folder, "me/small", revision="keep-0.6")
    branches = hub.repos["me/small"].branches
    assert "model.safetensors" in branches["keep-0.6"]
    assert set(branches["main"]) == {".gitattributes"}
    assert slimrank.push(folder, "me/small", create_pr=True).endswith("/discussions/1")
    slimrank.push(folder, "me/new", revision="first")
    assert "model.safetensors" in hub.repos["me/new"].branches["first"]


@pytest.mark.parametrize("revision", [None, "branch"])
@pytest.mark.parametrize("exists", [False, True])
def test_an_upload_that_fails_leaves_the_hub_as_it_was(folder, hub, exists, revision):
    if exists:
        hub.repos["me/small"] = Repo()
    hub.refuse["/commit/"] = 403
    with pytest.raises(HubError, match="cannot be uploaded to") as refused:
        slimrank.push(folder, "me/small", revision=revision)
    assert "the token may write" in refused.value.hint
    assert list(hub.repos) == (["me/small"] if exists else [])
    assert not exists or hub.repos["me/small"] == Repo()


def test_what_cannot_be_removed_is_named(folder, hub):
    hub.refuse |= {"/commit/": 403, "DELETE": 403}
    with pytest.raises(HubError, match="cannot be removed"):
        slimrank.push(folder, "me/small")


@pytest.mark.parametrize(
    "there, options, message",
    [
        ({}, {"create_pr": True}, "to open a pull request in"),
        ({"me/small": Repo()}, {"create_pr": True, "revision": "no"}, "has no branch 'no'"),
        ({"me/small": Repo()}, {"private": True}, "everyone can see it"),
        ({"me/small": Repo(branches={"main": {"model.safetensors": b""}})}, {}, "slimrank did not upload"),
    ],
)
def test_repositories_that_are_refused(folder, hub, there, options, message):
    hub.repos |= there
    with pytest.raises(HubError, match=message):
        slimrank.push(folder, "me/small", **options)
    assert not hub.writes()


@pytest.mark.parametrize("repo", ["small", "a/b/c", "me/sm all", "me/", "", "-/x--y"])
def test_names_that_the_hub_does_not_allow(folder, hub, repo):
    with pytest.raises(RecipeError, match="repository"):
        slimrank.push(folder, repo)
    assert not hub.requests


@pytest.mark.parametrize("licence, message", [("", "states no licence"), ("license: CC-BY-ND-4.0\n", "forbids")])
def test_a_model_that_must_not_be_seen_goes_to_private_repositories_only(folder, hub, licence, message):
    (folder / "README.md").write_text(f"---\n{licence}tags: [a]\n---\nhello")
    with pytest.raises(ModelError, match=message):
        slimrank.push(folder, "me/small")
    assert not hub.writes()
    slimrank.push(folder, "me/small", private=True)
    slimrank.push(folder, "me/small")  # it is private already
    assert hub.repos["me/small"].private


def test_no_token_no_hub(folder, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/such/file")
    with pytest.raises(HubError, match="no token") as refused:
        slimrank.push(folder, "me/small")
    assert "hf auth login" in refused.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.refuse["whoami"] = 401
    with pytest.raises(HubError, match="Invalid user token"):
        slimrank.push(folder, "me/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as refused:
        slimrank.push(folder, "me/small")
    assert refused.value.hint == "unset HF_HUB_OFFLINE"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError) as refused:
        slimrank.push(folder, "me/small")
    assert "http://127.0.0.1:9 can be reached" in refused.value.hint


def test_folders_that_are_refused(folder, hub, tmp_path):
    with pytest.raises(ModelError, match=r"no slimrank\.json"):
        slimrank.push(save_tiny(tmp_path / "tiny"), "me/small")
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(OutputError, match="lacks 1 files"):
        slimrank.push(folder, "me/small")
    (tmp_path / "config.json").rename(folder / "config.json")
    (folder / "README.md").write_text("---\n- a\n: b\n---\n")
    with pytest.raises(ModelError, match="cannot be read"):
        slimrank.push(folder, "me/small")
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(OutputError, match="other weights"):
        slimrank.push(folder, "me/small")
    (folder / "slimrank.json").write_text("{}")
    with pytest.raises(OutputError, match="does not say which files"):
        slimrank.push(folder, "me/small")
    assert not hub.requests


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_compress_uploads_its_result_with_what_the_card_of_the_original_says(hub, tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    (base / "README.md").write_text(CARD)
    asked = ["compress", base, "--keep", 0.6, "--method", "svd", "--no-eval"]
    code, shown, _ = run(capsys, *asked, "--out", tmp_path / "a", "--push-to-hub", "me/small", "--json")
    assert (code, json.loads(shown)["pushed"]) == (0, f"{hub.url}/me/small/commit/abc")
    card = ModelCard(hub.repos["me/small"].branches["main"]["README.md"].decode()).data
    assert (card.license, card.language) == ("apache-2.0", ["en", "de"])
    code, shown, _ = run(capsys, "push", tmp_path / "a", "me/again", "--private", "--json")
    assert json.loads(shown) == {"address": f"{hub.url}/me/again/commit/abc"}
    assert "uploaded: " in run(capsys, "push", tmp_path / "a", "me/again")[1]


def test_compress_asks_the_hub_before_the_work(hub, tmp_path, capsys, monkeypatch):
    base = save_tiny(tmp_path / "base")
    asked = ["compress", base, "--keep", 0.6, "--method", "svd", "--no-eval", "--out", tmp_path / "a"]
    code, _, error = run(capsys, *asked, "--push-to-hub", "me/small")
    assert (code, "states no licence" in error) == (1, True)
    code, _, error = run(capsys, *asked, "--private")
    assert (code, "--private is about an upload" in error) == (1, True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert run(capsys, *asked, "--push-to-hub", "me/small", "--private")[0] == 1
    assert not (tmp_path / "a").exists()


def test_a_result_that_could_not_be_uploaded_is_kept(hub, tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    hub.refuse["/commit/"] = 403
    asked = ["compress", base, "--keep", 0.6, "--method", "svd", "--no-eval", "--out", tmp_path / "a"]
    code, _, error = run(capsys, *asked, "--push-to-hub", "me/small", "--private")
    assert code == 1
    assert f"slimrank push '{tmp_path / 'a'}' me/small" in " ".join(error.split())
    assert (tmp_path / "a" / "config.json").is_file()
    assert hub.repos == {}


def test_hf_endpoint_names_the_hub(made):
    """As a user types it, in a process of its own."""
    with serving() as hub:
        about = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "slimrank", "push", str(made), "org/small", "--private"]
        result = subprocess.run(command, env=os.environ | about, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert f"{hub.url}/org/small/commit/abc" in result.stdout.replace("\n", "")
        assert "model.safetensors" in hub.repos["org/small"].branches["main"]
