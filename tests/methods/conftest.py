"""Every test of methods goes without what it does not depend on."""

from method_runs import _quick  # noqa: F401
