"""Ways to make a model smaller at equal bytes: pruning, blocks left out, signs, few bits, low rank, and both together.

    python benchmarks/equal_bytes.py --model demo --text TRAIN.txt --test TEST.txt --runs DIR [--rows wanda gptq ...]

Every row is one model whose linear layers take at most one of six sizes, all of whose bytes are counted: numbers,
masks, indices, scales, zero points. The sizes are parts of the 16-bit original, and what it takes in INT8, 6, 4 and 3.
The first --windows windows of the test text are measured. --samples windows of --seq-len tokens calibrate, those of the
training text that `slimrank.compress` draws. Weights are rounded to bfloat16 first, and every model computes in
float32, so only stored numbers differ. A row has the divergence from the original, and the ratio of perplexities with
the 95 % interval of the paired difference (`slimrank.evaluate.paired`).

Rows that stand in OUT/equal_bytes.json already are not computed again. Writes equal_bytes.md and, with matplotlib,
equal_bytes.svg beside it.
"""

import argparse
import copy
import json
import sys
import time
from functools import cached_property
from pathlib import Path

import torch
from equal_bytes_page import markdown, plot
from equal_bytes_rows import rows_of
from torch import nn

import slimrank
from slimrank.evaluate.agreement import agreement
from slimrank.evaluate.paired import compare_perplexities
from slimrank.linalg.scheme import Scheme
from slimrank.models.blocks import BlockRunner
from slimrank.models.load import load_model
from slimrank.models.recording import Batch
from slimrank.pipeline.model_bytes import index_bytes
from slimrank.progress import Progress
from slimrank.text.sources import read_source
from slimrank.text.tokens import bos_of, tokenise
from slimrank.text.windows import draw_windows, leading_windows

SIZES = ("0.8", "int8", "int6-g64", "0.318", "int4-g64", "int3-g64")  # part of 16 bits, or what dense weights take
NUMBER_BITS = 16  # of the original, and of scales
BATCH = 8  # windows at once, as `slimrank.compress` has it


class Remembered(nn.Module):
    """The original, which runs once on every batch: later, its output head alone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.states = model, {}

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, input_ids, use_cache):
        key = tuple(input_ids.flatten().tolist())
        if key in self.states:
            return self._answer(self.states[key])
        head = self.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args: self.states.update({key: args[0]}))
        found = self.model(input_ids=input_ids, use_cache=use_cache)
        hook.remove()
        if not torch.equal(self._answer(self.states[key]).logits, found.logits):
            sys.exit("the model's output is not that of its head alone")
        return found

    def _answer(self, state):
        return argparse.Namespace(logits=self.get_output_embeddings()(state))


class Study:
    """One model, its texts, and what several rows need of it."""

    def __init__(self, args):
        self.args = args
        loaded = load_model(args.model, "float32", Progress())
        self.original, self.tokenizer = loaded.model.bfloat16(), loaded.tokenizer
        self.targets = slimrank.find_targets(self.original)
        bos = bos_of(self.tokenizer)
        text, test = (
            tokenise(read_source(str(path), use), self.tokenizer)
            for path, use in ((args.text, "calibration"), (args.test, "evaluation"))
        )
        self.calibration = draw_windows(text, args.samples, args.seq_len, 0, bos)
        self.windows = leading_windows(test, args.windows, args.seq_len, bos)

    @cached_property
    def dense(self):
        return Remembered(self.float_copy())

    @property
    def numbers(self):
        return sum(target.parameters for target in self.targets)

    def float_copy(self):
        return copy.deepcopy(self.original).float().eval()

    def bytes_of(self, size):
        """Bytes of the linears at one of SIZES."""
        if size[0].isdigit():
            return int(float(size) * self.numbers * NUMBER_BITS / 8)
        integers = sum(Scheme.parse(size).stored_bits(*target.shape, NUMBER_BITS) for target in self.targets) // 8
        return integers + self.indices(f"dense:{size}")

    def indices(self, form):
        """Bytes of indices and shapes, where all linears have one form."""
        return index_bytes(form, self.targets)

    def runner(self, model):
        """The blocks of a model, and in front of them the calibration windows."""
        runner = BlockRunner(model, torch.device("cpu"), False, True)
        runner.embed(Batch(ids) for ids in self.calibration.split(BATCH))
        return runner

    @cached_property
    def influence(self):
        """1 - the cosine of hidden states before and after each block, mean over tokens."""
        runner, found = self.runner(self.float_copy()), []
        with runner.session():
            for index in range(len(runner)):
                before = torch.cat(runner.hidden)
                runner.step(index)
                found.append(
                    1 - float(nn.functional.cosine_similarity(before, torch.cat(runner.hidden), dim=-1).mean())
                )
        return found

    def compressed(self, folder="windows", **options):
        """The model as `slimrank.compress` makes it, in float32, and the bytes of its linears, indices among them.

        Rows whose `folder` is the same share spectra and losses; a run without text needs one of its own.
        """
        args, model = self.args, copy.deepcopy(self.original)
        options = {
            "run_dir": args.runs / folder,
            "evaluation": None,
            "calibration": str(args.text),
            "seq_len": args.seq_len,
            "batch_size": BATCH,
        } | options
        result = slimrank.compress(model, self.tokenizer, samples=args.samples, **options)
        indices = sum(index_bytes(result.plan.form_of(target.path), [target]) for target in self.targets)
        return result.model.float(), result.report["size"]["linears_bytes"] + indices


def measured(model, study):
    found = agreement(model, study.dense, study.windows)
    compared = compare_perplexities(found.model, found.dense)
    return {
        "kl": found.kl,
        "top1": found.top1,
        "perplexity": found.model.perplexity,
        "ratio": compared["ratio"],
        "interval": [compared["ratio_low"], compared["ratio_high"]],
    }


def row(make, study):
    start = time.perf_counter()
    model, size = make()
    seconds = time.perf_counter() - start
    bits = 8 * size / study.numbers
    return {"bytes": size, "bits": bits, **measured(model, study), "seconds": round(seconds)}


def written(path, results):
    """Write by another name first, so that an interruption leaves the former file."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(path)


def run(args, stored):
    """Compute the rows that are wanted and not stored yet."""
    study = Study(args)
    results = json.loads(stored.read_text()) if stored.is_file() else {}
    settings = {key: getattr(args, key) for key in ("samples", "seq_len", "windows")}
    mine = results.setdefault(Path(args.model).name.removesuffix(".gguf"), {"settings": settings, "rows": {}})
    if mine["settings"] != settings:
        sys.exit(f"{stored} was measured with other settings: {mine['settings']}")
    mine["sizes"] = {size: study.bytes_of(size) for size in SIZES}
    mine["dense"] = {"bytes": 2 * study.numbers, "weights": study.numbers}
    makers = {
        name: make for name, make in rows_of(study, SIZES).items() if not args.rows or name.startswith(tuple(args.rows))
    }
    left = [name for name in makers if name not in mine["rows"]]
    print(f"{len(makers) - len(left)} rows are done, {len(left)} are left: {', '.join(left)}", file=sys.stderr)
    for name in left:
        mine["rows"][name] = row(makers[name], study)
        written(stored, results)
        print(name, json.dumps(mine["rows"][name]), flush=True, file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, help="calibration text")
    parser.add_argument("--test", type=Path, help="text to measure on")
    parser.add_argument("--runs", type=Path, help="run directory, of statistics and spectra")
    parser.add_argument("--rows", nargs="+", help="rows that begin with these names; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--page", action="store_true", help="only write the page from the stored rows")
    args = parser.parse_args()
    stored = args.out / "equal_bytes.json"
    if not args.page:
        if args.text is None or args.test is None:
            parser.error("--text and --test are needed")
        run(args, stored)
    results = json.loads(stored.read_text())
    (args.out / "equal_bytes.md").write_text(markdown(results))
    try:
        plot(results, args.out / "equal_bytes.svg")
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main()
