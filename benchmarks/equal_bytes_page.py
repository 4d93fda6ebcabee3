"""The page and the plot of `equal_bytes.py`, from its stored rows."""

INTRODUCTION = """# Equal bytes

What `benchmarks/equal_bytes.py` has measured: ways to make the linear layers of a model smaller, at the same bytes. Cells are
perplexity over that of the 16-bit original, with the 95 % interval of the paired difference. Its columns are six sizes: 0.8 and
0.318 of 16 bits, and what the dense weights take in INT8 (a scale and a zero point for each row), INT6, INT4 and INT3 (for each
group of 64 columns). All bytes of a row count: 16-bit numbers and scales, zero points, masks, indices. Text is WikiText-2: train
to calibrate, test to measure.

![Perplexity by size](equal_bytes.svg)

| row | what it is | bytes of a layer of m x n |
|---|---|---|
| `magnitude` | the largest weights of each layer stay; the same part of all layers | 16 bits for each that stays, and a mask of 1 bit for each of m n, or column indices if they take less |
| `wanda` | the same by weight times norm of the input, the same part of all rows, block by block in the pruned model | the same |
| `magnitude 2:4`, `wanda 2:4` | two of every four weights of a row stay | 16 bits for each that stays, and 2 bits for its place |
| `blocks left out` | ShortGPT: blocks that change the direction of hidden states least are left out | those of the blocks that stay |
| `rtn`, `gptq` | few bits: to the nearest; `slimrank --quantize`, towards the outputs of the original | integers, scales, zero points |
| `signs, once`, `twice` | signs times mean size in groups of 64; twice: what is left of that again | 1 bit, and 16 bits for each group; twice that |
| `low rank` | `kfac_svd`, `spectrum`, pivot layers, 16 bits, without refining | numbers and indices of pivots |
| `low rank int6` | the same in 6 bits; only below INT6 | integers, scales, zero points, indices |
| `residual` | one width for all and a correction of one rank in 8 bits: the widest base that leaves room for rank 16; only below INT6, which loses hardly anything | integers, scales, zero points |
| `joint` | the preset `small`: form (dense or with a correction) and width of each layer chosen together | integers, scales, zero points |

Pruned weights are not trained again, and those that stay are not changed. BiLLM's split of salient columns, SparseGPT, refined or
recovered low rank, and pruned weights in few bits are not here. [Quality](../../docs/quality.md) has low rank with refining.

    python benchmarks/equal_bytes.py --model demo --text TRAIN.txt --test TEST.txt --runs DIR
    python benchmarks/equal_bytes.py --model gemma-3-270m.gguf --text TRAIN.txt --test TEST.txt --runs OTHER

computes what is left. Quality says how to get Gemma's file.
"""  # noqa: E501
HEADS = ("magnitude", "wanda", "blocks left out", "low rank", "low rank int6", "residual", "joint")
DENSE = ("rtn", "gptq")
COLUMNS = {"int8": "int8", "int6": "int6-g64", "int4": "int4-g64", "int3": "int3-g64"}  # scheme -> its size
ALONE = ("magnitude 2:4", "wanda 2:4", "signs, once", "signs, twice")  # of a size of their own
LARGEST = 1000.0  # ratio above which an order means nothing: the model is destroyed
BELOW_INT6 = ("residual", "low rank int6")  # methods that have rows at the last three sizes only
TITLES = {"demo": "SmolLM2-135M-Instruct", "gemma-3-270m": "Gemma 3 270M"}  # the models of the study


def number(value):
    if value > LARGEST:
        return "> 1,000"
    return f"{value:.3f}" if value < 2 else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def cell(row):
    if row is None:
        return ""
    if row["ratio"] > LARGEST:
        return "> 1,000"
    return f"{number(row['ratio'])} ({' to '.join(map(number, row['interval']))})"


def by_size(results):
    """Method -> its row at each of the six sizes, None where there is none."""
    rows, sizes = results["rows"], results["sizes"]
    found = {name: [rows.get(f"{name} {size / 1e6:.1f}") for size in sizes.values()] for name in HEADS}
    at = {size: scheme for scheme, size in COLUMNS.items()}
    return {name: [rows.get(f"{name} {at.get(size)}") for size in sizes] for name in DENSE} | found


def missing(results):
    """Rows that are not measured yet."""
    sizes = [f"{size / 1e6:.1f}" for size in results["sizes"].values()]
    wanted = [*ALONE, *(f"{name} {scheme}" for name in DENSE for scheme in COLUMNS)]
    wanted += [f"{name} {size}" for name in HEADS for size in (sizes[3:] if name in BELOW_INT6 else sizes)]
    return [name for name in wanted if name not in results["rows"]]


def table(head, lines):
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(x) + " |" for x in lines), ""]


def section(name, results):
    """The tables of one model: ratios by size, rows of sizes of their own, and everything."""
    dense, settings = results["dense"], results["settings"]
    lines = [
        f"## {TITLES.get(name, name)}",
        "",
        f"{dense['bytes'] / 1e6:.1f} MB in 16 bits. {settings['samples']} windows of {settings['seq_len']} tokens "
        f"calibrate, {settings['windows']} are measured.",
        "",
    ]
    sizes = [f"{size / 1e6:.1f} MB" for size in results["sizes"].values()]
    methods = {method: cells for method, cells in by_size(results).items() if any(cells)}
    lines += table(["", *sizes], ([method, *map(cell, cells)] for method, cells in methods.items()))
    alone = [(row, results["rows"][row]) for row in ALONE if row in results["rows"]]
    if alone:
        lines += table(["", "MB", "perplexity ratio"], ([n, f"{r['bytes'] / 1e6:.1f}", cell(r)] for n, r in alone))
    left = missing(results)
    if left:
        lines += [f"Not measured yet: {'; '.join(left)}. The command above continues.", ""]
    lines += ["All rows, by size:", ""]
    order = sorted(results["rows"].items(), key=lambda item: -item[1]["bytes"])
    head = ["row", "MB", "bits a weight", "KL, nats a token", "same first token, %", "perplexity ratio", "seconds"]
    return lines + table(head, ([n, *every_cell(r)] for n, r in order))


def every_cell(row):
    return [
        f"{row['bytes'] / 1e6:.1f}", f"{row['bits']:.2f}", f"{row['kl']:.4f}" if row["kl"] < 1 else f"{row['kl']:.2f}",
        f"{row['top1']:.1f}", cell(row), f"{row['seconds']:,}",
    ]  # fmt: skip


def markdown(results):
    lines = [INTRODUCTION]
    for name, model in results.items():
        lines += section(name, model)
    for title in (title for name, title in TITLES.items() if name not in results):
        lines += [f"## {title}", "", "Not measured yet.", ""]
    return "\n".join(lines).rstrip() + "\n"


def plot(results, path):
    """Two rows of panels: all ratios on a logarithmic axis, and those near 1; a column for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plt.rcParams["svg.hashsalt"] = "slimrank"  # the same figures give the same file
    figure, axes = plt.subplots(2, len(results), figsize=(5.5 * len(results), 9), layout="constrained", squeeze=False)
    for column, (name, model) in enumerate(results.items()):
        for panel in axes[:, column]:
            draw(panel, model, plt.get_cmap("tab10").colors)
        axes[0, column].set(title=TITLES.get(name, name), yscale="log", ylim=(0.9, LARGEST))
        axes[0, column].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes[0, column].yaxis.set_minor_formatter(NullFormatter())
        axes[1, column].set(xlabel="MB of the linear layers", ylim=(0.98, 1.3))
    for row in axes[:, 0]:
        row.set_ylabel("perplexity over the original's")
    axes[0, 0].legend(fontsize="x-small", ncols=2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw(panel, model, colours):
    series = {name: [row for row in cells if row] for name, cells in by_size(model).items()}
    series |= {name: [model["rows"][name]] for name in ALONE if name in model["rows"]}
    for number_, (name, rows) in enumerate(series.items()):
        if not rows:
            continue  # keeps its colour for when it is measured
        rows = sorted(rows, key=lambda row: row["bytes"])
        ratios = [row["ratio"] for row in rows]
        below, above = ([abs(row["interval"][end] - row["ratio"]) for row in rows] for end in (0, 1))
        style = {"marker": "o" if len(rows) > 1 else "^", "linestyle": "-" if number_ < 10 else "none", "markersize": 3}
        megabytes = [row["bytes"] / 1e6 for row in rows]
        panel.errorbar(
            megabytes,
            ratios,
            yerr=[below, above],
            label=name,
            color=colours[number_ % 10],
            linewidth=1,
            capsize=2,
            **style,
        )
    panel.axhline(1, color="black", linewidth=0.7)
    panel.grid(alpha=0.3)
