"""A pretend transform: the last norm of a model inside a module of its own."""

from torch import nn

from slimrank.layers.transforms import Transform


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class WrappedNorms(Transform):
    kind = "wrapped_norms"

    def apply(self, model, entry):
        for path in entry["paths"]:
            model.set_submodule(path, Wrapped(model.get_submodule(path)))

    def undo(self, model):
        for path in (self.entry(model) or {"paths": []})["paths"]:
            model.set_submodule(path, model.get_submodule(path).inner)

    def entry(self, model):
        paths = [path for path, module in model.named_modules() if isinstance(module, Wrapped)]
        return {"paths": paths} if paths else None

    def needed(self, entry):
        return [f"{path}." for path in entry["paths"]]
