"""From a budget to text: look ahead, compress, look at the layers, load with plain transformers, generate.

python examples/from_python.py [MODEL] [KEEP]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import slimrank
from slimrank.progress import Progress


class Narrator(Progress):
    """Print the stages; an object with the methods of `Progress` receives all that happens."""

    def stage(self, name: str, steps: int) -> None:
        print(f"{name}: {steps} steps")


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    recipe = {**slimrank.Recipe.preset("fast"), "keep_ratio": float(sys.argv[2]) if len(sys.argv) > 2 else 0.8}

    ahead = slimrank.preview(model, **recipe)  # loads no weights
    sizes = ahead["size"]
    print(f"{sizes['parameters_before']:,} parameters, to become {sizes['parameters_after']:,}")

    result = slimrank.compress(model, out="from-python", progress=Narrator(), **recipe)
    before, after = (result.report[when]["perplexity"]["perplexity"] for when in ("before", "after"))
    print(f"perplexity {before:.2f}, now {after:.2f}")
    worst = sorted(result.report["targets"], key=lambda row: row["relative_error"])[-3:]
    print("farthest from the original:", ", ".join(f"{row['path']} (rank {row['rank']})" for row in worst))

    small = AutoModelForCausalLM.from_pretrained("from-python")
    tokenizer = AutoTokenizer.from_pretrained("from-python")
    prompt = tokenizer("The Python language is", return_tensors="pt")
    print(tokenizer.decode(small.generate(**prompt, max_new_tokens=24, do_sample=False)[0]))
