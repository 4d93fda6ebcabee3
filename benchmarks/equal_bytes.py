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
from pruning import (
    NUMBER_BITS,
    InputSquares,
    LeftOut,
    blocks_to_keep,
    kept_in_rows,
    largest,
    largest_per_row,
    signs,
    signs_bits,
    sparse_bits,
    two_of_four,
    two_of_four_bits,
    wanda_scores,
)
from torch import nn

import slimrank
from slimrank.budget.rank_plan import RankPlan
from slimrank.evaluate.agreement import agreement
from slimrank.evaluate.paired import compare_perplexities
from slimrank.layers.forms import layer_form
from slimrank.linalg.scheme import Scheme
from slimrank.models.blocks import BlockRunner
from slimrank.models.load import load_model
from slimrank.models.recording import Batch
from slimrank.pipeline.model_bytes import ModelBytes, index_bytes
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.text.sources import read_source
from slimrank.text.tokens import bos_of, tokenise
from slimrank.text.windows import draw_windows, leading_windows

GROUP = 64
SIZES = ("0.8", "int8", "int6-g64", "0.318", "int4-g64", "int3-g64")  # part of 16 bits, or what dense weights take
LOW_RANK = {"method": "kfac_svd", "allocation": "spectrum", "form": "pivot"}
LEAST_RANK = 16  # of a correction: else a narrower base
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
        if key not in self.states:
            found = self.model(input_ids=input_ids, use_cache=use_cache)
            state = self.model.get_decoder()(input_ids=input_ids, use_cache=use_cache).last_hidden_state
            if not torch.equal(self._answer(state).logits, found.logits):
                sys.exit("the output of the model is not that of its head on its last hidden states")
            self.states[key] = state
        return self._answer(self.states[key])

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
        return sum(Scheme.parse(size).stored_bits(*target.shape, NUMBER_BITS) for target in self.targets) // 8

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

    def compressed(self, **options):
        """The model as `slimrank.compress` makes it, in float32, and the bytes of its linears, indices among them."""
        args, model = self.args, copy.deepcopy(self.original)
        options = {
            "evaluation": None,
            "calibration": str(args.text),
            "seq_len": args.seq_len,
            "batch_size": BATCH,
        } | options
        result = slimrank.compress(model, self.tokenizer, run_dir=args.runs, samples=args.samples, **options)
        indices = sum(index_bytes(result.plan.form_of(target.path), [target]) for target in self.targets)
        return result.model.float(), result.report["size"]["linears_bytes"] + indices


def weights_of(model, study):
    return {target.path: model.get_submodule(target.path).weight.data for target in study.targets}


def rounded(study, scheme, rounding):
    options = {"rounding": rounding}
    return study.compressed(method="svd", keep_ratio=1.0, quantize=scheme, quantize_options=options)


def in_signs(study, planes):
    model = study.float_copy()
    for weight in weights_of(model, study).values():
        weight.copy_(signs(weight, GROUP, planes, torch.bfloat16))
    return model, sum(signs_bits(*target.shape, GROUP, planes) for target in study.targets) // 8


def masked(study, mask_of, bits_of, by_inputs):
    """Prune block by block: `mask_of` takes a path and scores. Scores of Wanda see the inputs in the pruned model."""
    model = study.float_copy()
    weights, bits = weights_of(model, study), 0
    for path, squares in inputs_of(study, model) if by_inputs else ((path, None) for path in weights):
        weight = weights[path]
        mask = mask_of(path, weight.abs() if squares is None else wanda_scores(weight, squares.to(weight)))
        weight.mul_(mask)
        bits += bits_of(int(mask.sum()), *weight.shape)
    return model, -(-bits // 8)


def inputs_of(study, model):
    """Yield every target and the squares of its inputs, block by block; what is changed meanwhile feeds the next."""
    runner = study.runner(model)
    with runner.session():
        for index in range(len(runner)):
            layers = {target.path: model.get_submodule(target.path) for target in study.targets.in_block(index)}
            with InputSquares(layers) as squares:
                runner.through(runner.states, index, index + 1)
            yield from squares.sums.items()
            runner.step(index)


def half(study, by_inputs):
    return masked(
        study, lambda path, scores: two_of_four(scores), lambda kept, *shape: two_of_four_bits(*shape), by_inputs
    )


def unstructured(study, size, by_inputs):
    """Equal parts of all rows (Wanda), or of all layers (magnitude)."""
    counts = kept_in_rows([target.shape for target in study.targets], 8 * size)
    count_of = {target.path: count for target, count in zip(study.targets, counts, strict=True)}

    def mask_of(path, scores):
        return largest_per_row(scores, count_of[path]) if by_inputs else largest(scores, count_of[path] * len(scores))

    return masked(study, mask_of, sparse_bits, by_inputs)


def shallow(study, size):
    model = study.float_copy()
    blocks = BlockRunner(model, torch.device("cpu"), False, True).blocks
    sizes = [2 * sum(t.parameters for t in study.targets.in_block(index)) for index in range(len(blocks))]
    kept = blocks_to_keep(study.influence, sizes, size)
    for index in set(range(len(blocks))) - set(kept):
        blocks[index] = LeftOut()
    return model, sum(sizes[index] for index in kept)


def low_rank(study, size):
    return study.compressed(**LOW_RANK, keep_ratio=size / (2 * study.numbers))


def low_rank_int6(study, size):
    """Ranks such that their numbers in 6 bits with scales and zero points take what is asked for."""
    part = size / study.bytes_of("int6-g64")
    return study.compressed(**LOW_RANK, keep_ratio=part, quantize="int6-g64", rank_multiple=GROUP)


def joint(study, size):
    """Form, rank and width of every layer chosen together: the preset `small`."""
    options = {**slimrank.Recipe.preset("small"), "max_bytes": 2 * study.numbers}
    besides = ModelBytes.of(study.original, study.targets).besides(Recipe.make(options), study.original, study.targets)
    return study.compressed(**{**options, "max_bytes": size + besides, "samples": study.args.samples})


def residual(study, size):
    """The widest base, of one width for all, that leaves room for a correction; its rank is as large as fits."""
    for bits in range(8, 1, -1):
        form = layer_form(f"residual:int{bits}-g{GROUP}/int8")

        def taken(rank, form=form):
            return sum(form.bits(*t.shape, min(rank, *t.shape), NUMBER_BITS) for t in study.targets) // 8

        if taken(LEAST_RANK) <= size:
            break
    rank = max(rank for rank in range(LEAST_RANK, 2048) if taken(rank) <= size)
    ranks = {t.path: min(rank, *t.shape) for t in study.targets}
    forms = dict.fromkeys(ranks, form.name)
    plan = RankPlan.build(ranks, {t.path: t.shape for t in study.targets}, "by hand", None, forms=forms)
    return study.compressed(method="svd", plan=plan)


FIXED = {  # rows whose size follows from what they are
    **{f"rtn int{b}": lambda study, b=b: rounded(study, _dense(b), "nearest") for b in (8, 6, 4, 3)},
    "signs, once": lambda study: in_signs(study, 1),
    "signs, twice": lambda study: in_signs(study, 2),
    "magnitude 2:4": lambda study: half(study, False),
    "wanda 2:4": lambda study: half(study, True),
}
SIZED = {
    "magnitude": lambda study, size: unstructured(study, size, False),
    "wanda": lambda study, size: unstructured(study, size, True),
    "blocks left out": shallow,
}
SLOW_FIXED = {f"gptq int{b}": lambda study, b=b: rounded(study, _dense(b), "gptq") for b in (4, 3, 6, 8)}
SLOW_SIZED = {"low rank": low_rank, "joint": joint, "residual": residual, "low rank int6": low_rank_int6}


def _dense(bits):
    return "int8" if bits == 8 else f"int{bits}-g{GROUP}"


def rows_of(study):
    """Every row and what makes it, cheap ones first."""
    found = {}
    for fixed, sized in ((FIXED, SIZED), (SLOW_FIXED, SLOW_SIZED)):
        found |= {name: (lambda make=make: make(study)) for name, make in fixed.items()}
        for name, make in sized.items():
            for size in map(study.bytes_of, SIZES):
                if name != "low rank int6" or size < 0.99 * study.bytes_of("int6-g64"):
                    found[f"{name} {size / 1e6:.1f}"] = lambda make=make, size=size: make(study, size)
    return found


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
    makers = {name: make for name, make in rows_of(study).items() if not args.rows or name.startswith(tuple(args.rows))}
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
    parser.add_argument("--windows", type=int, default=16)
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
