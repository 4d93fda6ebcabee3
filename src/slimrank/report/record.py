"""The record of a run: the content of report.json, typed. Its JSON schema is `docs/report.schema.json`.

Optional fields are left out of the file where there is nothing to state.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimrank.report.section import Section

RECORD_VERSION = 1  # raised when a field is renamed, removed or given another meaning


class Part(BaseModel):
    """A part of a record: it does not change and knows its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class OpenPart(Part):
    """A part that methods may add fields to."""

    model_config = ConfigDict(extra="allow")


class Model(Part):
    """The model that was compressed."""

    name: str
    """Hub id, path or class, as it was given."""
    hub_id: str | None
    """Its name on the Hugging Face hub, if it is from there."""
    license: dict[str, Any]
    """The fields license, license_name and license_link of its card, as far as they are stated."""
    language: list[str] = []
    """Codes of the languages that its card states."""
    class_: str = Field(alias="class")
    """The class of transformers."""


class Size(Part):
    """Sizes before and after."""

    stored_as: str
    """What factored layers are stored as."""
    keep_ratio: float
    """Parameters of the compressible linears, after over before."""
    keep_total: float
    """Parameters of the whole model, after over before."""
    removed_ratio: float
    """1 - keep_ratio, as the literature states it."""
    linears_before: int
    """Parameters of the compressible linears."""
    linears_after: int
    """The same, compressed."""
    parameters_before: int
    """Parameters of the whole model."""
    parameters_after: int
    """The same, compressed."""
    bytes_before: int
    """Bytes of the weights."""
    bytes_after: int
    """The same, compressed: of the weight files, if any were written."""
    linears_bytes: int = 0
    """Bytes that the compressed linears store: numbers, scales and zero points; 0 in older reports."""


class PerplexityRecord(Part):
    """Perplexity and what it was measured on."""

    perplexity: float
    """exp of the mean negative log-likelihood per predicted token."""
    windows: int
    """Number of windows, without overlap."""
    seq_len: int
    """Tokens per window; seq_len - 1 of them are predicted."""
    tokens: int
    """Predictions in all."""
    bos: bool
    """Whether each window begins with a BOS token."""
    nll: list[float]
    """Mean negative log-likelihood of each window, in nats a token."""


class SampleRecord(Part):
    """A sample of what the model writes."""

    prompt: str
    """The beginning of the evaluation text."""
    text: str
    """The model's greedy continuation."""


class MetricRecord(OpenPart):
    """The value of a metric from outside slimrank; a metric may add fields."""

    value: float
    """The value."""
    title: str
    """The metric's name for people."""
    unit: str
    """Unit of the value; empty if it has none."""
    better: Literal["lower", "higher"]
    """Which values are better."""


class Side(OpenPart):
    """What was measured before or after; empty without an evaluation text.

    A field of any other name is a metric from outside slimrank, by its id.
    """

    __pydantic_extra__: dict[str, MetricRecord]

    perplexity: PerplexityRecord | None = None
    """Perplexity on the evaluation text."""
    sample: SampleRecord | None = None
    """How the model goes on from the beginning of that text."""
    peak_memory: int | None = None
    """Largest memory of the process or the device so far, in bytes."""


class Coverage(Part):
    """Parameters of the model by what becomes of them."""

    total: int
    """Parameters of the whole model, tied ones once."""
    targets: int
    """Parameters of the weights that are compressed."""
    of_matrices: float
    """Fraction of the decoder's weight matrices that is compressed."""
    left_out: dict[str, int]
    """Reason -> parameters that are not compressed, largest first."""


class AllocationRecord(OpenPart):
    """How the ranks were chosen; an allocator adds its options and what it found ("gap", "trade_off", ...)."""

    id: str
    """The allocator."""


class CorrectionRound(Part):
    """One round of correction: divergences from the original, in nats a token."""

    here: float
    """On the windows of the round, before it."""
    before: float
    """On held-out windows, before it."""
    after: float
    """On held-out windows, after it."""
    length: float
    """Length of the step that was taken; 0 if none was."""
    kept: bool
    """Whether the step was accepted."""


class Refined(OpenPart):
    """Relative errors of a refined layer's output, on the inputs that the compressed model gives."""

    before: float
    """Before refining."""
    after: float
    """After refining."""


class TargetRow(OpenPart):
    """One compressed weight."""

    path: str
    """Its path in the model."""
    kind: str
    """The kind of layer that it is in."""
    block: int
    """Index of its decoder block."""
    role: str
    """Its path inside the block."""
    shape: list[int]
    """Outputs, inputs."""
    rank: int | Literal["dense"]
    """The rank of its factors; "dense" if it stays as it was."""
    parameters_before: int
    """Parameters of the weight."""
    parameters_after: int
    """Parameters of what replaces it."""
    relative_error: float
    """Norm of the difference over norm of the original, in the metric of the method."""
    group: str
    """The first target of those that share a factor with it; its own path if none does."""
    refined: Refined | None = None
    """Errors before and after refining, if it was refined."""
    form: str | None = None
    """What it is stored as, if its numbers are integers: "dense:int4-g64", "pivot:int5-g64", ..."""
    rounded: float | None = None
    """Norm of the difference that rounding makes to its outputs over their norm, if inputs were looked at."""


class SpectrumOutline(Part):
    """The relative error of a weight at some ranks, in the metric of the method."""

    ranks: list[int]
    """Increasing."""
    errors: list[float]
    """The relative error at each rank."""


class Provenance(Part):
    """What made the model, of what, and on which machine."""

    slimrank: str
    """Version of slimrank."""
    threads: int
    """Threads of a computation on the CPU."""
    python: str
    """Version of Python."""
    versions: dict[str, str]
    """Package -> version."""
    recipe: dict[str, Any]
    """All fields of the recipe."""
    method: dict[str, Any]
    """The decomposition method with all its options."""
    inputs: dict[str, Any]
    """Digests of the model and the calibration windows, and which layers are targets."""
    dtype: str
    """The dtype of the model."""
    device: str
    """The device that computed."""


class RunRecord(Part):
    """What was asked, what was done, and the result."""

    model: Model
    """The model that was compressed."""
    size: Size
    """Sizes before and after."""
    kv_bytes: dict[str, dict[str, int]] = {}
    """Bytes of the compressed model's caches of keys and values, for one text, by formula: cache -> tokens -> bytes.
    "dynamic", keys and values as they are, is also that of the original; "latent" and "latent-int8" are caches of
    latents; "int8" and "int4" hold keys and values in so many bits. Empty for a cache of something else."""
    before: Side
    """Measurements of the original model."""
    after: Side
    """Measurements of the compressed model."""
    coverage: Coverage
    """What is compressed, and what is not for which reason."""
    allocation: AllocationRecord
    """How the ranks were chosen."""
    corrections: list[CorrectionRound]
    """Rounds of correction, in order."""
    targets: list[TargetRow]
    """Every compressed weight."""
    spectra: dict[str, SpectrumOutline]
    """Path of a layer -> its spectrum; layers that share a factor share that of the first."""
    notes: list[str]
    """What was skipped, clamped or unusual."""
    overlap: str
    """A warning if the calibration text contains evaluation windows; else empty."""
    seconds: dict[str, float]
    """Stage -> seconds that it took."""
    provenance: Provenance
    """What made the model, of what, and on which machine."""
    sections: list[Section]
    """What other stages report."""
    record_version: int = RECORD_VERSION
    """Version of this layout."""

    def content(self) -> dict[str, Any]:
        """Return the content of report.json, as reading the file gives it back."""
        content: dict[str, Any] = json.loads(json.dumps(self.model_dump(by_alias=True, exclude_unset=True)))
        return content


def record_schema() -> dict[str, Any]:
    """Return the JSON schema of report.json."""
    return RunRecord.model_json_schema(by_alias=True)
