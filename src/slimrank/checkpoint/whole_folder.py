"""An output folder that is written whole or not at all, whatever ends the work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimrank.checkpoint.output_folder import OutputFolder


@contextmanager
def whole(output: OutputFolder) -> Iterator[Path]:
    """Yield the folder to write into; whatever ends the work before its end leaves nothing, an interrupt as well."""
    with output.writing() as partial:
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
