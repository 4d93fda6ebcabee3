"""The command line. One file per command; nothing heavy is imported before a command runs."""

from slimrank.cli.app import main

__all__ = ["main"]
