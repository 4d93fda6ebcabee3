"""`push`: upload a folder that slimrank wrote, in one commit, or leave the hub as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from slimrank._version import __version__
from slimrank.checkpoint.output_folder import MANIFEST
from slimrank.errors import HubError
from slimrank.hub.contents import WEIGHTS, Contents
from slimrank.hub.destination import Destination
from slimrank.hub.explained import explained
from slimrank.hub.licences import check_licence


@dataclass(frozen=True)
class Repository:
    """What is on the hub before anything is written.

    Attributes:
        private: whether only its owners see it.
        exists: whether the repository is there.
        branch: whether the branch is there.
        names: files of the branch; of the main one, where that is not there.
        ours: those of them that its manifest names.
    """

    private: bool
    exists: bool
    branch: bool
    names: frozenset[str] = frozenset()
    ours: frozenset[str] = frozenset()


def push(
    folder: str | Path, repo: str, *, private: bool = False, revision: str | None = None, create_pr: bool = False
) -> str:
    """Upload a folder that slimrank wrote to the hub.

    Only files that slimrank wrote go up, and the model card, as you may have changed it. Files of an earlier upload
    that the new one does not have are deleted there, in the same commit. If it fails, a repository or branch that was
    made for it is removed again.

    Args:
        folder: what `compress`, `recover`, `convert`, `correct` or `export` wrote.
        repo: ORG/NAME. It is made if it does not exist.
        private: make it private then.
        revision: the branch, made if it does not exist; by default the main one.
        create_pr: open a pull request instead.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        RecipeError: `repo` is not a name that the hub allows.
        ModelError: slimrank did not write the folder; or the licence of the original is not known or forbids it, and
            everyone could see the repository.
        OutputError: files of the folder are missing, or its weights are others.
        HubError: no token, the hub is not reachable or refuses, or the repository holds another model.
    """
    destination, contents = Destination(repo, private, revision, create_pr), Contents.of(folder)
    found = check_push(destination, contents.about)
    with explained(repo, "uploaded to"), _undone_after_errors() as undo:
        api = HfApi()
        _make(api, destination, found, undo)
        return _commit(api, destination, contents, found)


def check_push(destination: Destination, about: dict[str, Any]) -> Repository:
    """Make sure, without writing anything, that an upload may be made; return what is on the hub.

    Args:
        destination: where it goes.
        about: the metadata of the model card, or the licence alone.

    Raises:
        ModelError: everyone could see the repository, and the licence of the original is not known or forbids that.
        HubError: no token, the hub is not reachable, or something else is in the repository.
    """
    with explained(destination.repo, "uploaded to"):
        if get_token() is None:
            raise LocalTokenNotFoundError("there is no token of the hub on this machine")
        api = HfApi()
        api.whoami()
        found = _found(api, destination)
    _check_found(destination, found)
    if not found.private:
        check_licence(about)
    return found


def _found(api: HfApi, destination: Destination) -> Repository:
    """Ask what is there."""
    try:
        info, branch = api.model_info(destination.repo, revision=destination.revision), True
    except RevisionNotFoundError:
        info, branch = api.model_info(destination.repo), False
    except RepositoryNotFoundError:
        return Repository(destination.private, exists=False, branch=False)
    names = frozenset(sibling.rfilename for sibling in info.siblings or ())
    ours = _names_in_manifest(api, destination.repo, str(info.sha)) if MANIFEST in names else frozenset[str]()
    return Repository(bool(info.private), True, branch, names, ours & names)


def _names_in_manifest(api: HfApi, repo: str, commit: str) -> frozenset[str]:
    content: dict[str, Any] = json.loads(
        Path(api.hf_hub_download(repo, MANIFEST, revision=commit)).read_text(encoding="utf-8")
    )
    return frozenset((MANIFEST, *content["files"], *content["reports"]))


def _check_found(destination: Destination, found: Repository) -> None:
    """Refuse what would publish something by mistake, or mix two models.

    Raises:
        HubError: it would.
    """
    if destination.create_pr and not found.exists:
        raise HubError(f"there is no '{destination.repo}' to open a pull request in.", "leave out --create-pr")
    if destination.create_pr and not found.branch:
        raise HubError(
            f"'{destination.repo}' has no branch '{destination.revision}' to open a pull request for.",
            "leave out --create-pr, or --revision",
        )
    if destination.private and not found.private:
        raise HubError(f"'{destination.repo}' exists, and everyone can see it.", "another name, or leave out --private")
    others = sorted(name for name in found.names - found.ours if name.endswith(WEIGHTS))
    if others:
        raise HubError(
            f"'{destination.repo}' holds weights that slimrank did not upload ('{others[0]}'), which may be loaded "
            "instead of these.",
            "another name",
        )


@contextmanager
def _undone_after_errors() -> Iterator[list[Callable[[], Any]]]:
    """Yield a list for what undoes the steps that were done; it is used if the context does not end well."""
    undo: list[Callable[[], Any]] = []
    try:
        yield undo
    except BaseException as error:
        for step in reversed(undo):
            _undo(step, error)
        raise


def _undo(step: Callable[[], Any], error: BaseException) -> None:
    try:
        step()
    except Exception as trouble:
        raise HubError(
            f"the upload failed ({error}), and what was made for it cannot be removed: {trouble}",
            "delete the empty repository or branch on the hub",
        ) from error


def _make(api: HfApi, destination: Destination, found: Repository, undo: list[Callable[[], Any]]) -> None:
    """Make the repository and the branch, where they are not there."""
    repo, branch = destination.repo, destination.revision
    if not found.exists:
        api.create_repo(repo, private=destination.private)
        undo.append(lambda: api.delete_repo(repo))
    if branch is not None and not found.branch and branch != "main":
        api.create_branch(repo, branch=branch)
        if found.exists:
            undo.append(lambda: api.delete_branch(repo, branch=branch))


def _commit(api: HfApi, destination: Destination, contents: Contents, found: Repository) -> str:
    added = [CommitOperationAdd(name, contents.content(name, destination.repo)) for name in contents.names]
    stale = [CommitOperationDelete(name) for name in sorted(found.ours - set(contents.names))]
    commit = api.create_commit(
        destination.repo,
        [*added, *stale],
        commit_message=f"slimrank {__version__}",
        revision=destination.revision,
        create_pr=destination.create_pr,
    )
    return str(commit.pr_url or commit.commit_url)
