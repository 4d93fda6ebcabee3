"""Write the compressed model, its loader and the reports about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimrank.checkpoint.output_folder import CARD, OutputFolder, write_manifest
from slimrank.checkpoint.save import save_model, weight_bytes
from slimrank.pipeline.forecast import Cost, Shape
from slimrank.pipeline.record import record_of
from slimrank.pipeline.stage import Stage
from slimrank.processes import by_leader
from slimrank.report.card import model_card
from slimrank.report.write import write_reports
from slimrank.store import write_text

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Prepared
    from slimrank.pipeline.state import State

PARAMETER_BYTES = 4  # at most, of the targets, while they are written


class Save(Stage):
    """Write everything to the output folder.

    Args:
        output: the folder; None to estimate what writing takes.
    """

    id, order, title = "save", 100, "write"

    def __init__(self, output: OutputFolder | None) -> None:
        super().__init__()
        self.output = output

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        return Cost(written=PARAMETER_BYTES * sum(t.parameters for t in shape.targets))

    def run(self, state: State) -> None:
        record = record_of(state)
        by_leader(lambda: self._write(record, state))

    def _write(self, record: dict[str, Any], state: State) -> None:
        assert self.output is not None
        with self.output.writing() as partial:
            with state.timed(self.title, 1):
                size = state.prepared.recipe.max_shard_size
                record["notes"] += save_model(state.model, state.inputs.tokenizer, partial, size)
            record["size"]["bytes_after"] = weight_bytes(partial)
            state.plan.save(partial / "plan.json")
            self._write_card(record, partial)
            write_manifest(partial, record["provenance"])
            write_reports(record, partial)

    def _write_card(self, record: dict[str, Any], folder: Any) -> None:
        """Write the model card; a card that slimrank did not write stays unchanged."""
        assert self.output is not None
        if self.output.keeps_card:
            record["notes"].append(f"{CARD} in the output folder was changed by someone else and stays as it is")
        else:
            write_text(folder / CARD, model_card(record))
