"""What training is said to take, before it begins."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import slimrank
from helpers import save_tiny, text, tiny_model
from slimrank.methods.recoverer import RECOVERERS
from slimrank.pipeline.preview import preview
from slimrank.progress import Progress
from slimrank.recovery.cost import OVERHEAD, Sizes, training_cost
from slimrank.recovery.loss import Terms
from slimrank.recovery.student import Student

TOKENS, SEQ_LEN = 64, 16


def sizes(model):
    return Sizes.of(model, tiny_model())


@pytest.fixture(scope="module")
def small():
    return slimrank.compress(tiny_model(), keep_ratio=0.6, method="svd", evaluation=None).model.requires_grad_(True)


def test_operations_are_those_that_torch_counts(small):
    """The products with weights of one step; those of attention, which grow with the window, are left out."""
    small.get_input_embeddings().requires_grad_(False)
    small.get_output_embeddings().requires_grad_(False)
    student = Student(small, tiny_model().requires_grad_(False), Terms())
    ids = torch.arange(TOKENS).view(-1, SEQ_LEN) % 40
    counter = FlopCounterMode(display=False)
    with counter:
        student(ids, torch.ones_like(ids, dtype=torch.bool))["loss"].backward()
    operations = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in operations.items() if "attention" not in str(op) and "bmm" not in str(op))
    found = training_cost(sizes(small), RECOVERERS.get("distill").configured({}), TOKENS, SEQ_LEN).operations
    assert found / OVERHEAD == pytest.approx(counted, rel=0.05)


def cost(small, id="distill", tokens=TOKENS, **options):
    return training_cost(sizes(small), RECOVERERS.get(id).configured(options), tokens, SEQ_LEN)


def test_cost_follows_the_options(small):
    whole = cost(small)
    assert cost(small, tokens=2 * TOKENS).operations == 2 * whole.operations
    assert cost(small, tokens=2 * TOKENS).peak == whole.peak
    assert cost(small, micro_batch=1).peak < whole.peak
    recomputed = cost(small, checkpointing=True)
    assert recomputed.peak < whole.peak
    assert recomputed.operations > whole.operations
    assert cost(small, "lora_sequential").operations == 2 * cost(small, "lora").operations
    assert cost(small, "block").peak < whole.peak  # no logits


class Told(Progress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def test_recover_tells_it_before_training(tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text(400))
    slimrank.compress(tmp_path / "model", out=tmp_path / "small", keep_ratio=0.6, method="svd", evaluation=None)
    told, options = Told(), {"tokens": 96, "held_out": 2, "batch_size": 2, "checks": 1}
    slimrank.recover(
        tmp_path / "small", out=tmp_path / "better", text=str(tmp_path / "text.txt"), options=options, evaluation=(),
        seq_len=24, progress=told,
    )  # fmt: skip
    (found,) = [note for note in told.notes if note.startswith("training on")]
    assert re.match(r"training on 96 tokens: about \d+ minutes, [\d.]+ GB of memory", found)


def test_plan_counts_the_tokens_of_a_text_that_is_read_once(tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text(400))
    (tmp_path / "twice.txt").write_text(text(400) * 2)
    options = {"method": "svd", "keep_ratio": 0.6, "recover": "distill", "evaluation": None}
    once, twice = (
        preview(str(tmp_path / "model"), calibration=str(tmp_path / name), **options)["seconds"]["recover"]
        for name in ("text.txt", "twice.txt")
    )
    assert twice == pytest.approx(2 * once, rel=0.01)
    set_ = {**options, "recover_options": {"tokens": 480}}
    assert preview(str(tmp_path / "model"), calibration=str(tmp_path / "text.txt"), **set_)["seconds"]["recover"] > 0
