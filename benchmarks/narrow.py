"""Narrow models: quality by share kept and by how they are made, their speed, and the same models in llama.cpp.

    python benchmarks/narrow.py --model demo --text TRAIN.txt --test TEST.txt --out DIR [--rows ...] [--keep 0.8 0.7]
    pip install xllamacpp && python benchmarks/narrow.py --model demo --out DIR --llama-cpp NARROW_FOLDER

Every row is made at every --keep on the same --samples windows of --seq-len tokens, and measured on the first --windows
windows of the test text beside the original, all in float32. Speeds are those of `slimrank benchmark`, in turns. With
--llama-cpp a folder is exported as GGUF (F32, F16 and Q8_0). Log-probabilities of the likeliest tokens in llama.cpp are
compared with those of transformers, as are the tokens of some texts. Results are kept in DIR/narrow.json; cells that
stand there are not computed again.
"""

import argparse
import json
import platform
import urllib.request
from pathlib import Path

import torch

import slimrank
from slimrank.evaluate.api import benchmark
from slimrank.models.load import load

ROWS = {
    "leverage, own inputs": {"select": "leverage", "refit": "readers", "anchor": 0.0},
    "leverage": {"select": "leverage", "refit": "readers"},
    "pivoted": {"select": "pivoted", "refit": "readers"},
    "eliminate": {"select": "eliminate", "refit": "readers"},
    "eliminate, all layers": {"select": "eliminate", "refit": "all"},
    "eliminate, all layers, multiple of 32": {"select": "eliminate", "refit": "all", "multiple": 32},
}
PROMPTS = ("The capital of France is", "In 1998, 3 of 12 people", "def add(a, b):\n    return", "Water boils at")
LIKELIEST = 10


def made(args, row, keep):
    out = args.out / "model"
    result = slimrank.narrow(
        args.model, out=out, overwrite=True, keep_ratio=keep, calibration=args.text, samples=args.samples,
        seq_len=args.seq_len, evaluation=(args.test,), windows=args.windows, dtype="float32", **ROWS[row],
    )  # fmt: skip
    found, record = result.record.measured[args.test], result.record
    size = {key: getattr(record.after, key) / getattr(record.before, key) for key in ("linears", "parameters")}
    cell = {
        "widths": {name: list(pair) for name, pair in record.widths.items()}, **size, "ratio": found["ratio"],
        "kl": found["kl"], "perplexity": found.get("perplexity"),
        "seconds": record.seconds, "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    if args.speed:
        speeds = benchmark(out, args.model, prompts=[512], new_tokens=32, repeats=5, busy=True, dtype="float32")
        cell["speed"] = speeds["rows"][0]
        cell["others"] = speeds["others"]
    return cell


def _tokens(address, text):
    """The tokens of a text in llama.cpp."""
    body = json.dumps({"content": text, "add_special": True}).encode()
    asked = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)["tokens"]


def in_llama_cpp(folder, out):
    """Export a folder as GGUF and compare it in llama.cpp with transformers."""
    from llama_cpp import largest_difference, predictions, server_of

    model, tokenizer = load(folder, "float32")
    prompts, rows = [tokenizer(text).input_ids for text in PROMPTS], {}
    for weights in ("float32", "float16", "int8"):
        record = slimrank.export(folder, out / f"gguf-{weights}", to="gguf", weights=weights, overwrite=True)
        server = server_of(out / f"gguf-{weights}" / "model.gguf")
        found = predictions(server, prompts, LIKELIEST)
        tokens = [_tokens(server.listening_address, text) for text in PROMPTS]
        rows[weights] = {
            "bytes": record.bytes, "read back": record.difference, "log-probability": largest_difference(
                model, prompts, found), "same tokens": sum(a == b for a, b in zip(tokens, prompts, strict=True)),
            "texts": len(PROMPTS),
        }  # fmt: skip
    return rows


def markdown(results):
    lines = ["# Narrow models", "", "What `benchmarks/narrow.py` has measured, in float32.", ""]
    for model, found in results.items():
        settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items())
        lines += [f"## {model}", "", f"{settings}.", ""]
        lines += [
            "| how | keep | linears | parameters | perplexity over dense | KL | seconds | prefill, decode |",
            "|---" * 8 + "|",
        ]
        for row, cells in found["rows"].items():
            for keep, cell in cells.items():
                lines.append("| " + " | ".join([row, keep, *_numbers(cell)]) + " |")
        lines.append("")
        for folder, kinds in found.get("llama.cpp", {}).items():
            lines += [
                f"`{folder}` in llama.cpp:",
                "",
                "| weights | MB | log-probability off by at most | texts with the same tokens |",
                "|---" * 4 + "|",
            ]
            lines += [
                f"| {kind} | {c['bytes'] / 1e6:.1f} | {c['log-probability']:.4f} | {c['same tokens']} of {c['texts']} |"
                for kind, c in kinds.items()
            ]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _numbers(cell):
    speed = cell.get("speed")
    shown = "" if speed is None else ", ".join(f"{speed['ratios'][part][0]:.2f}" for part in ("prefill", "decode"))
    return [
        f"{cell['linears']:.3f}", f"{cell['parameters']:.3f}", f"{cell['ratio']:.3f}", f"{cell['kl']:.3f}",
        f"{cell['seconds']:.0f}", shown,
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", help="calibration text")
    parser.add_argument("--test", help="text to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--speed", action="store_true", help="measure speeds, too")
    parser.add_argument("--llama-cpp", help="only compare this folder in llama.cpp")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stored = args.out / "narrow.json"
    results = json.loads(stored.read_text()) if stored.is_file() else {}
    settings = {key: getattr(args, key) for key in ("samples", "seq_len", "windows")}
    mine = results.setdefault(Path(args.model).stem, {"settings": settings, "rows": {}})
    mine["machine"] = platform.machine()

    def store():
        stored.write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "narrow.md").write_text(markdown(results))

    if args.llama_cpp:
        mine.setdefault("llama.cpp", {})[Path(args.llama_cpp).name] = in_llama_cpp(args.llama_cpp, args.out)
        store()
        return
    for row in args.rows:
        for keep in args.keep:
            cells = mine["rows"].setdefault(row, {})
            if str(keep) not in cells:
                cells[str(keep)] = made(args, row, keep)
                store()
                print(row, keep, cells[str(keep)]["ratio"], flush=True)


if __name__ == "__main__":
    main()
