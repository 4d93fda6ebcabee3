"""Trace the files that one weight passes on its way from `compress` to the saved factors.

    python benchmarks/weights_way.py [--path model.layers.0.mlp.down_proj]

Compresses a tiny random model. A file counts if one of its functions is called with the weight, with its layer, or with
the target, unit or path that names it. Prints the files in the order in which the weight first reaches them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from factor_digests import TEXT, tiny
from torch import Tensor, nn

import slimrank

ROOT = Path(slimrank.__file__).parent


class Tracer:
    """Notes every file of slimrank in which a function is called with what belongs to a weight."""

    def __init__(self, model, path):
        self.model, self.path = model, path
        self.pointer = model.get_submodule(path).weight.data_ptr()
        self.files = {}

    def __call__(self, frame, event, argument):
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        if event != "call" or not name.startswith(str(ROOT)) or function.startswith("<"):  # loops over all targets
            return
        if any(map(self._belongs, [*frame.f_locals.values()])):
            self.files.setdefault(str(Path(name).relative_to(ROOT)), function)

    def _belongs(self, value):
        if isinstance(value, Tensor):
            return value.device.type != "meta" and value.data_ptr() == self.pointer
        if isinstance(value, nn.Module):
            return value is dict(self.model.named_modules()).get(self.path)
        return value == self.path if isinstance(value, str) else getattr(value, "path", None) == self.path


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--path", default="model.layers.0.mlp.down_proj")
    model, tokenizer = tiny()
    tracer = Tracer(model, parser.parse_args().path)
    options = {"keep_ratio": 0.8, "method": "svd_llm", "samples": 2, "seq_len": 32, "evaluation": None}
    with tempfile.TemporaryDirectory() as folder:
        sys.setprofile(tracer)
        try:
            slimrank.compress(model, tokenizer, calibration=[TEXT], out=Path(folder) / "out", **options)
        finally:
            sys.setprofile(None)
    for file, function in tracer.files.items():
        print(f"{file} ({function})")
    print(f"{len(tracer.files)} files")


if __name__ == "__main__":
    main()
