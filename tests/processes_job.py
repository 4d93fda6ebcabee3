"""Compressions that one process, or several under torchrun, run in the same way: `python processes_job.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import slimrank
from helpers import byte_tokenizer, text, tiny_model
from slimrank.layers.dense import weight_of
from slimrank.processes import is_leader

TEXT = {"samples": 7, "seq_len": 24, "batch_size": 2, "windows": 2, "search_samples": 4}
REFINED = {"method": "kfac_svd", "allocation": "spectrum", "refine": "regress"}
JOBS = {
    "refined": ("llama", REFINED),
    "halves, resident": (
        "llama",
        {**REFINED, "refine_options": {"ridge": "auto"}, "resident": True},
    ),
    "experts": ("qwen3_moe", {"method": "svd_llm"}),
    "whole text": ("llama", {"method": "gfwsvd"}),
}


WRITTEN = "whole text"  # the job that also writes its model


def run(folder, names=JOBS):
    """Run some of the jobs; each leaves the weights that its layers stand for, and its plan and notes."""
    for name in names:
        architecture, options = JOBS[name]
        made = slimrank.compress(
            tiny_model(architecture), byte_tokenizer(), calibration=(text(),), run_dir=folder / "runs" / name,
            out=folder / "out" if name == WRITTEN else None, evaluation=None, **{"keep_ratio": 0.6, **TEXT, **options},
        )  # fmt: skip
        if is_leader():
            weights = {path: dense(made.model.get_submodule(path)) for path in made.plan.targets}
            about = {"plan": made.plan.model_dump_json(), "notes": json.dumps(made.report["notes"])}
            save_file(weights, folder / f"{name}.safetensors", about)


def dense(layer):
    """The weight that a layer stands for."""
    weight = layer.to_dense().weight if hasattr(layer, "to_dense") else weight_of(layer)
    return weight.detach().double().contiguous()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else JOBS)
