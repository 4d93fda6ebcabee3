"""Where on the hub a folder goes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from slimrank.errors import RecipeError

_WHAT_IT_IS = "write ORG/NAME, where ORG may be your user name"


@dataclass(frozen=True)
class Destination:
    """A repository of the hub, and how it is written to.

    Attributes:
        repo: ORG/NAME.
        private: make the repository private, if it has to be made.
        revision: the branch; None is the main one. It is made if it does not exist.
        create_pr: open a pull request instead of writing to the branch.

    Raises:
        RecipeError: `repo` is not a name that the hub allows, or an empty revision.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise RecipeError(f"'{self.repo}' is not the name of a repository: {error}", _WHAT_IT_IS) from error
        if not re.fullmatch(r"[^/]+/[^/]+", self.repo):
            raise RecipeError(f"'{self.repo}' names no repository of a user or an organisation.", _WHAT_IT_IS)
        if self.revision is not None and not self.revision.strip():
            raise RecipeError("the revision has no name.", "name a branch, or leave it out")
