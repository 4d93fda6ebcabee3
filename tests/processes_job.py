"""Compressions that one process, or several under torchrun, run in the same way: `python processes_job.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from helpers import byte_tokenizer, text, tiny_model

import slimrank

TEXT = {"samples": 7, "seq_len": 24, "batch_size": 2, "windows": 2, "search_samples": 4}
REFINED = {"method": "kfac_svd", "allocation": "spectrum", "refine": "regress"}
JOBS = {
    "inputs": ("llama", {"method": "svd_llm"}),
    "refined": ("llama", {**REFINED, "form": "pivot"}),
    "halves, resident": ("llama", {**REFINED, "refine_options": {"ridge": "auto"}, "resident": True}),
    "measured, corrected": ("llama", {"method": "svd_llm", "allocation": "lems", "corrections": 1}),
    "shared bases": ("llama", {"method": "basis_sharing"}),
    "whole text": ("llama", {"method": "gfwsvd"}),
    "experts": ("qwen3_moe", {"method": "kfac_svd"}),
    "few bits": ("llama", {"method": "svd", "keep_ratio": 1.0, "quantize": "int4-g16", "dtype": "auto"}),
}


def run(folder, names=JOBS):
    """Run some of the jobs; every folder gets its plan, its weights and its report."""
    (folder / "text.txt").write_text(text(), encoding="utf-8")
    for name in names:
        architecture, options = JOBS[name]
        slimrank.compress(
            tiny_model(architecture), byte_tokenizer(), out=folder / name, calibration=str(folder / "text.txt"),
            evaluation=None, **{"keep_ratio": 0.6, **TEXT, **options},
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else JOBS)
