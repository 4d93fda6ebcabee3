"""The rows of `equal_bytes.py`: each is a function that makes a smaller model, and counts the bytes of its linears.

Functions that take a size stay within so many bytes. All get the `Study` of a model: original, targets, texts.
"""

import torch
from pruning import (
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

from slimrank.budget.rank_plan import RankPlan
from slimrank.layers.forms import layer_form
from slimrank.models.structure import find_blocks
from slimrank.pipeline.model_bytes import ModelBytes
from slimrank.recipe import Recipe

GROUP = 64
NUMBER_BITS = 16
LOW_RANK = {"method": "kfac_svd", "allocation": "spectrum", "form": "pivot"}
LEAST_RANK, MOST_RANK = 16, 2048  # of a correction; with less room than for the least, the base is narrower


def weights_of(model, study):
    return {target.path: model.get_submodule(target.path).weight.data for target in study.targets}


def rounded(study, scheme, rounding):
    options = {"method": "svd", "keep_ratio": 1.0, "quantize": scheme, "quantize_options": {"rounding": rounding}}
    return study.compressed("nearest" if rounding == "nearest" else "windows", **options)


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
    _, blocks = find_blocks(model)
    sizes = [2 * sum(t.parameters for t in study.targets.in_block(index)) for index in range(len(blocks))]
    kept = blocks_to_keep(study.influence, sizes, size)
    for index in set(range(len(blocks))) - set(kept):
        blocks[index] = LeftOut()
    return model, sum(sizes[index] for index in kept)


def low_rank(study, size):
    part = (size - study.indices("pivot")) / (2 * study.numbers)
    return study.compressed(**LOW_RANK, keep_ratio=part)


def low_rank_int6(study, size):
    """Ranks such that their numbers in 6 bits with scales and zero points take what is asked for."""
    form = "pivot:int6-g64"
    part = (size - study.indices(form)) / (study.bytes_of("int6-g64") - study.indices("dense:int6-g64"))
    options = {**LOW_RANK, "quantize": "int6-g64", "rank_multiple": GROUP}
    return study.compressed(**options, keep_ratio=part)


def joint(study, size):
    """Form, rank and width of every layer chosen together: the preset `small`."""
    options = {key: value for key, value in Recipe.preset("small").items() if key != "samples"}
    recipe = Recipe.make({**options, "max_bytes": 2 * study.numbers})
    besides = ModelBytes.of(study.original, study.targets).besides(recipe, study.original, study.targets)
    return study.compressed(**options, max_bytes=size + besides)


def residual(study, size):
    """The widest base, of one width for all, that leaves room for a correction; its rank is as large as fits."""
    for bits in range(8, 1, -1):
        form = layer_form(f"residual:int{bits}-g{GROUP}/int8")

        def taken(rank, form=form):
            bits = sum(form.bits(*t.shape, min(rank, *t.shape), NUMBER_BITS) for t in study.targets)
            return bits // 8 + study.indices(form.name)

        if taken(LEAST_RANK) <= size:
            break
    rank = max(rank for rank in range(1, MOST_RANK) if taken(rank) <= size)
    ranks = {t.path: min(rank, *t.shape) for t in study.targets}
    forms = dict.fromkeys(ranks, form.name)
    plan = RankPlan.build(ranks, {t.path: t.shape for t in study.targets}, "by hand", None, forms=forms)
    return study.compressed(method="svd", plan=plan)


FIXED = {  # rows whose size follows from what they are
    "signs, once": lambda study: in_signs(study, 1),
    "signs, twice": lambda study: in_signs(study, 2),
    "magnitude 2:4": lambda study: half(study, False),
    "wanda 2:4": lambda study: half(study, True),
    **{f"rtn int{b}": lambda study, b=b: rounded(study, _dense(b), "nearest") for b in (3, 4, 6, 8)},
}
SIZED = {
    "magnitude": lambda study, size: unstructured(study, size, False),
    "wanda": lambda study, size: unstructured(study, size, True),
    "blocks left out": shallow,
}
SLOW_FIXED = {f"gptq int{b}": lambda study, b=b: rounded(study, _dense(b), "gptq") for b in (4, 3, 6, 8)}
NARROW = ("residual", "low rank int6")  # only at sizes below that of INT6, which loses hardly anything
SLOW_SIZED = {"low rank": low_rank, "joint": joint, "residual": residual, "low rank int6": low_rank_int6}


def _dense(bits):
    return "int8" if bits == 8 else f"int{bits}-g{GROUP}"


def rows_of(study, sizes):
    """Every row and what makes it, cheap ones first."""
    found = {}
    for fixed, sized in ((FIXED, SIZED), (SLOW_FIXED, SLOW_SIZED)):
        found |= {name: (lambda make=make: make(study)) for name, make in fixed.items()}
        for name, make in sized.items():
            for size in map(study.bytes_of, sizes):
                if name not in NARROW or size < 0.99 * study.bytes_of("int6-g64"):
                    found[f"{name} {size / 1e6:.1f}"] = lambda make=make, size=size: make(study, size)
    return found
