"""The rank of a weight."""

from __future__ import annotations

from typing import Literal

Rank = int | Literal["dense"]
