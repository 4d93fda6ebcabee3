"""A pretend form of layers and a pretend transform, registered from outside the package for the tests of one file."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

from slimrank.layers.base import KINDS
from slimrank.layers.layer_form import FORMS
from slimrank.layers.transforms import TRANSFORMS

FOLDER = Path(__file__).parents[1] / "data" / "outside"
FORM, TRANSFORM = "eight_bits", "wrapped_norms"


@contextmanager
def registered():
    sys.path.insert(0, str(FOLDER))
    try:
        yield [importlib.import_module(name) for name in (FORM, TRANSFORM)]
    finally:
        sys.path.remove(str(FOLDER))
        for name in (FORM, TRANSFORM):
            sys.modules.pop(name)
        for registry, name in ((KINDS, FORM), (FORMS, FORM), (TRANSFORMS, TRANSFORM)):
            registry.pop(name)
