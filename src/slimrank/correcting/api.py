"""`correct`: find low-rank factors of what a quantised model lacks, measure them, and write them as an adapter."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from slimrank.checkpoint.output_folder import OutputFolder, need_space, write_manifest
from slimrank.correcting.differences import DIFFERENCE, OF_IT, with_differences
from slimrank.correcting.gguf_lora import ADAPTER, need_gguf, write_gguf_lora
from slimrank.correcting.peft_folder import Factors, adapter_bytes, cast, write_peft
from slimrank.correcting.quantised_models import load_quantised
from slimrank.correcting.record import CorrectionRecord, write_record
from slimrank.correcting.request import Correction
from slimrank.errors import BudgetError, ModelError, RecipeError
from slimrank.evaluate.paired import MIN_ITEMS
from slimrank.evaluate.suite import Suite, compare
from slimrank.evaluate.windows import windows_of
from slimrank.layers.balancing import balanced
from slimrank.layers.low_rank import LowRankLinear
from slimrank.models.load import load_model
from slimrank.models.placement import placed, resolve_device
from slimrank.models.targets import TargetSet, find_targets
from slimrank.pipeline.compression import compress
from slimrank.pipeline.run_folder import place_of_run, run_folder
from slimrank.progress import Progress
from slimrank.text.sources import read_source
from slimrank.text.texts import window_length
from slimrank.text.tokens import bos_of


@dataclass(frozen=True)
class CorrectionResult:
    """What `correct` returns.

    Attributes:
        model: the corrected model: quantised weights as ordinary numbers, and the factors.
        factors: path of each layer -> A (rank x n) and B (m x rank), as they are stored.
        record: what was done.
        out: the folder that was written.
    """

    model: Any
    factors: dict[str, tuple[Tensor, Tensor]]
    record: CorrectionRecord
    out: Path


def correct(
    quantised: str | Path,
    original: str | Path,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CorrectionResult:
    """Write a low-rank correction of a model that is quantised already, as a LoRA adapter of PEFT.

    For every linear layer, B A approximates W - Q in the metric of the method (K-FAC by default), with ranks that are
    allocated over all layers. So Q x + B A x is nearer to W x (Zhang et al., QERA, arXiv 2410.06040, for one layer).

    Args:
        quantised: a folder that transformers loads, or a GGUF file.
        original: the model that it was made of, not quantised.
        out: folder to write to.
        overwrite: replace what slimrank wrote to `out` before.
        progress: told what happens.
        options: fields of `Correction`, and `run_dir`: where finished parts are stored, so that an interrupted run goes
            on and another size needs no new calibration; by default `OUT.run`, which is removed at the end.

    Raises:
        RecipeError: unknown options, or values out of range.
        BudgetError: not even rank 1 fits in the bytes.
        ModelError: a model that cannot be loaded, two models that do not belong together, or equal ones.
        OutputError: the output folder is in use, or cannot be written.
        RunError: the run directory belongs to another run.
    """
    run_dir = options.pop("run_dir", None)
    asked, progress = Correction.make(options), progress or Progress()
    device = resolve_device(asked.device)
    output = OutputFolder(Path(out), overwrite)
    output.rehearse()
    place = place_of_run(output, run_dir)
    _check_gguf(asked, quantised)
    sources = {name: read_source(name, "evaluation") for name in asked.evaluation}
    dense = load_model(original, "float32", progress)
    given = load_quantised(quantised, progress)
    _check_pair(given, dense.model)
    targets = find_targets(dense.model)
    numbers = _numbers(asked, targets)
    suite = _suite(asked, sources, dense)
    model = with_differences(given, dense.model, targets)  # before measuring, which takes longer than refusing
    before = _measured(given, dense, suite, device, progress)
    del given
    transposed = any(isinstance(module, Conv1D) for module in dense.model.modules())
    with run_folder(output, place) as folder:
        start = time.perf_counter()
        notes = _factorized(model, dense.tokenizer, asked, numbers / targets.coverage.targets, folder, progress)
        factors = _take_factors(model, targets, asked.dtype)
        seconds = time.perf_counter() - start
        after = _measured(model, dense, suite, device, progress)
        record = CorrectionRecord(
            str(quantised), str(original), asked, {path: len(a) for path, (a, _) in factors.items()},
            adapter_bytes(factors), targets.coverage.targets, before, after, seconds, [*dense.notes, *notes],
        )  # fmt: skip
        _write(output, record, factors, model, transposed)
    return CorrectionResult(model, factors, record, output.path)


def _check_gguf(asked: Correction, quantised: str | Path) -> None:
    if asked.gguf and Path(quantised).suffix != ".gguf":
        raise RecipeError("a GGUF adapter belongs to a GGUF file.", "give a GGUF file, or leave out --gguf")
    if asked.gguf:
        need_gguf()


def _check_pair(quantised: Any, original: Any) -> None:
    """Make sure that both are models of one kind.

    Raises:
        ModelError: architecture or vocabulary differ.
    """
    kinds = [model.config.get_text_config().model_type for model in (quantised, original)]
    if kinds[0] != kinds[1]:
        raise ModelError(f"the quantised model is a {kinds[0]}, and the original a {kinds[1]}.", OF_IT)
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (quantised, original)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"the quantised model knows {sizes[0]:,} tokens, and the original {sizes[1]:,}.", OF_IT)


def _numbers(asked: Correction, targets: TargetSet) -> int:
    """Return how many numbers the factors may have.

    Raises:
        BudgetError: rank 1 in every layer has more.
    """
    each = sum(sum(target.shape) for target in targets)
    wanted = each * asked.rank if asked.rank is not None else (asked.max_bytes or 0) // asked.dtype.itemsize
    if wanted < each:
        least = asked.dtype.itemsize * each
        raise BudgetError(f"rank 1 in every layer takes {least:,} bytes.", f"--max-bytes {least} or more")
    return wanted


def _suite(asked: Correction, sources: dict[str, Any], dense: Any) -> Suite:
    size: Any = {"windows": asked.windows, "seq_len": window_length(dense.model, asked.seq_len), "least": MIN_ITEMS}
    found = {name: windows_of(name, source, dense.model, dense.tokenizer, **size) for name, source in sources.items()}
    return Suite(found, bos_of(dense.tokenizer) is not None)


def _measured(model: Any, dense: Any, suite: Suite, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Measure a model beside the original, on the device."""
    if not suite.texts:
        return {}
    with placed([model, dense.model], device, upcast=False):
        return compare(model, dense.model, dense.tokenizer, suite, progress)[1]["texts"]


def _factorized(
    model: Any, tokenizer: Any, asked: Correction, share: float, folder: Path, progress: Progress
) -> list[str]:
    """Replace all differences by factors, with finished parts in a run directory; return what the compression notes."""
    refined: dict[str, Any] = {"refine": "regress", "refine_options": {"anchor": 0.0}} if asked.sequential else {}
    result = compress(
        model, tokenizer, method=asked.method, allocation=asked.allocation, form="pair", keep_ratio=share,
        ranks={"*": "1..1000000"}, targets=(f"*.{DIFFERENCE}",), calibration=asked.calibration,
        samples=asked.samples, seq_len=asked.seq_len, seed=asked.seed, device=asked.device, evaluation=None,
        run_dir=folder, progress=progress, **refined,
    )  # fmt: skip
    return list(result.report["notes"])


@torch.no_grad()
def _take_factors(model: Any, targets: TargetSet, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Return all factors as they are stored, and let the model compute with these."""
    found = {}
    for target in targets:
        layer = model.get_submodule(f"{target.path}.{DIFFERENCE}")
        assert isinstance(layer, LowRankLinear)
        found[target.path] = cast(*balanced(*layer.factors()), dtype)
        for part, stored in zip((layer.A, layer.B), found[target.path], strict=True):
            part.weight.copy_(stored)
    return found


def _write(output: OutputFolder, record: CorrectionRecord, factors: Factors, model: Any, transposed: bool) -> None:
    need_space(output.path, record.size)
    with output.writing() as partial:
        write_peft(factors, record.quantised, transposed, partial)
        if record.asked.gguf:
            weights = {path: model.get_submodule(path).base for path in factors}
            write_gguf_lora(factors, weights, Path(record.quantised), partial / ADAPTER)
        write_record(record, partial)
        write_manifest(partial, {"correct": {"quantised": record.quantised, "original": record.original}})
