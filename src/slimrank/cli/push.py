"""slimrank push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import print_json, print_text, say_quietly

_HUB = "Hub"

ToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub", help="Upload the folder to this ORG/NAME of the hub at the end.", rich_help_panel=_HUB
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="Make the repository private, if it has to be made.", rich_help_panel=_HUB)
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, made if it does not exist.  \\[default: the main one]", rich_help_panel=_HUB),
]
CreatePr = Annotated[
    bool,
    typer.Option("--create-pr", help="Open a pull request instead of writing to the branch.", rich_help_panel=_HUB),
]


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that slimrank wrote.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the hub; ORG may be your user name.", show_default=False)],
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    json: o.Json = False,
) -> None:
    """Upload a folder that slimrank wrote to the Hugging Face hub, in one commit.

    Only files that slimrank wrote go up, and the model card. It needs a token with the right to write: hf auth login.

    Example: slimrank push smaller ORG/NAME --private
    """
    say_quietly()
    from slimrank.hub.pushing import push as library_push

    address = library_push(folder, repo, private=private, revision=revision, create_pr=create_pr)
    print_json({"address": address}) if json else print_text(f"uploaded: {address}")


def destination(model: str, repo: str | None, private: bool, revision: str | None, create_pr: bool) -> Any:
    """Return where a result is to go, if anywhere; the hub is asked now, before the work, whether it may.

    Raises:
        RecipeError: options for an upload without one, or a name that the hub does not allow.
        SlimrankError: see `hub.pushing.check_push`.
    """
    from slimrank.errors import RecipeError

    if repo is None:
        given = {"--private": private, "--revision": revision is not None, "--create-pr": create_pr}
        for option in (name for name, used in given.items() if used):
            raise RecipeError(f"{option} is about an upload, and none is asked for.", "--push-to-hub ORG/NAME")
        return None
    from slimrank.hub.destination import Destination
    from slimrank.hub.pushing import check_push
    from slimrank.models.provenance import origin_of

    where = Destination(repo, private, revision, create_pr)
    check_push(where, origin_of(model)["license"])
    return where
