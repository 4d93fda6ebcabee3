"""Corrections of GGUF files: the divergence before and after, and whether llama.cpp computes what slimrank measured.

    pip install xllamacpp
    python benchmarks/corrected_gguf.py BASE.gguf [--types Q2_K Q3_K Q4_0 F32] [--padded] [--rank 16] --out DIR

BASE is a GGUF file; its numbers count as the original. Its linear layers are rounded by llama.cpp's own functions to
each type (F32: to 7 levels a row, all in float32, adapter, too, so that llama.cpp rounds nothing itself). A type whose
blocks do not fit a layer gives way to IQ4_NL, as in llama.cpp; `--padded` gives a Llama more heads and channels first,
all of zeros, so that blocks of 256 fit every layer and the model computes the same. `slimrank correct --gguf` corrects
the file, and llama.cpp runs both. Printed are JSON rows: how many layers have which type, bits, divergence and
perplexity before and after, and the largest difference of log-probabilities of the likeliest tokens between llama.cpp
and transformers, with the adapter and without.
"""

import argparse
import ctypes
import json
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch
import xllamacpp
from llama_cpp import largest_difference, predictions, server_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimrank

LAYERS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def add(a, b):\n    return",
    "Once upon a time",
]
INSTEAD = gguf.GGMLQuantizationType.IQ4_NL
LIKELIEST = 20
F32_LEVELS = 3  # on each side of 0
BLOCK = 256  # columns of a block of the types Q2_K to Q6_K


def chunk_quantizer():
    """The function of llama.cpp that rounds rows of floats."""
    library = ctypes.CDLL(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


def rounded(weight, kind, quantize):
    """A weight in a type: the array that GGUF stores, and the type."""
    rows, columns = weight.shape
    if kind == gguf.GGMLQuantizationType.F32:
        step = np.abs(weight).max(1, keepdims=True) / F32_LEVELS
        return (np.rint(weight / step) * step).astype(np.float32), kind
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if columns % block:
        kind = INSTEAD
        block, size = gguf.GGML_QUANT_SIZES[kind]
    source = np.ascontiguousarray(weight, np.float32)
    found = np.zeros((rows, columns // block * size), np.uint8)
    quantize(int(kind), source.ctypes.data, found.ctypes.data, 0, rows, columns, None)
    return found, kind


def write(base, kind, path):
    """Copy a GGUF file with its linear layers in another type; return the bits a weight of these, and their types."""
    reader, quantize = gguf.GGUFReader(base), chunk_quantizer()
    writer = copied(reader, path, {})
    bits = numbers = 0
    types = Counter()
    for tensor in reader.tensors:
        if tensor.name.split(".")[-2] in LAYERS and tensor.name.endswith(".weight"):
            data, found = rounded(gguf.dequantize(tensor.data, tensor.tensor_type), kind, quantize)
            bits, numbers = bits + 8 * data.nbytes, numbers + int(tensor.n_elements)
            types[found.name] += 1
        elif kind == gguf.GGMLQuantizationType.F32:
            data, found = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32), kind
        else:
            data, found = tensor.data, tensor.tensor_type
        writer.add_tensor(tensor.name, data, raw_dtype=found)
    finish(writer)
    return bits / numbers, dict(types)


def copied(reader, path, changed):
    """A writer of a file with the fields of another one, of which some are changed."""
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, changed.get(field.name, field.contents()), field.types[0], inner)
    return writer


def finish(writer):
    """Write all that a writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_padded(base, path):
    """Copy a Llama in float16, with channels and heads of zeros so that blocks fit; it computes the same."""
    reader = gguf.GGUFReader(base)
    fields = {
        name: reader.fields[f"llama.{name}"].contents()
        for name in ("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    }
    width, hidden, heads, shared = fields.values()
    wide, size = -(-width // BLOCK) * BLOCK, width // heads
    more_heads, more_shared = wide // size, wide // size * shared // heads
    assert more_heads * size == wide, "heads do not fill the wider model"
    assert more_shared * heads == more_heads * shared, "groups of heads change"
    sizes = {shared * size: more_shared * size, hidden: -(-hidden // BLOCK) * BLOCK, width: wide}
    norm = "llama.attention.layer_norm_rms_epsilon"
    changed = dict(
        zip((f"llama.{name}" for name in fields), (wide, sizes[hidden], more_heads, more_shared), strict=True)
    )
    changed[norm] = reader.fields[norm].contents() * width / wide
    writer = copied(reader, path, changed)
    for tensor in reader.tensors:
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        made = np.pad(found, [(0, sizes.get(n, n) - n) for n in found.shape])
        scale = (width / wide) ** 0.5 if "norm" in tensor.name else 1.0
        writer.add_tensor(tensor.name, (made * scale).astype(np.float32 if made.ndim == 1 else np.float16))
    finish(writer)
    return path


def gap(model, server, prompts):
    """The largest difference of a log-probability in llama.cpp and here."""
    return round(largest_difference(model, prompts, predictions(server, prompts, LIKELIEST)), 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K", "Q4_0", "F32"])
    parser.add_argument("--padded", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sequential", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = write_padded(args.base, args.out / "padded.gguf") if args.padded else args.base
    tokenizer = AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    for name in args.types:
        path, adapter = args.out / f"{name}.gguf", args.out / f"{name}-adapter"
        bits, types = write(base, gguf.GGMLQuantizationType[name], path)
        size = {"samples": args.samples, "seq_len": args.seq_len, "windows": args.windows}
        size |= {"sequential": args.sequential, "adapter_dtype": "float32" if name == "F32" else "float16"}
        result = slimrank.correct(path, base, adapter, overwrite=True, rank=args.rank, gguf=True, **size)
        plain = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        record = result.record
        print(json.dumps({
            "type": name, "padded": args.padded, "layers": types,
            "bits": round(bits, 3), "bits_added": round(record.bits, 3),
            **{f"{key} {when}": round(side["demo"][key], 4)
               for key in ("kl", "ratio") for when, side in (("before", record.before), ("after", record.after))},
            "llama.cpp": gap(plain, server_of(path), prompts),
            "llama.cpp with adapter": gap(result.model, server_of(path, adapter / "adapter.gguf"), prompts),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
