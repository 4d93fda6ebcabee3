"""Two processes of one thread each against one: time by part of a compression, ranks, and perplexity.

    python benchmarks/processes.py [--model demo] [--processes 2] [--rounds 1] [-- OPTIONS OF COMPRESS ...]

Runs `slimrank compress` with the same options under torchrun and alone, in turns, and reads both reports. Everything
after `--` goes to `compress`; by default that is `kfac_svd`, `spectrum` and pivot layers at 0.8, on 16 windows. Figures
go to stdout as one JSON document.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

OPTIONS = ["--method", "kfac_svd", "--allocation", "spectrum", "--form", "pivot", "--samples", "16", "--windows", "8"]


def run(model, count, options, folder):
    """Compress once; return the report."""
    launch = [] if count == 1 else ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m"]
    command = [
        sys.executable,
        "-m",
        *launch,
        "slimrank",
        "compress",
        model,
        *options,
        "--out",
        str(folder),
        "--overwrite",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "report.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("options", nargs="*", help="of compress, after --")
    args = parser.parse_args()
    options = args.options or OPTIONS
    if not any(option.startswith("--keep") for option in options):
        options = [*options, "--keep", "0.8"]
    reports = {1: [], args.processes: []}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(args.rounds):
            for count, made in reports.items():
                made.append(run(args.model, count, options, Path(place) / str(count)))
    seconds = {
        count: {part: median(r["seconds"][part] for r in made) for part in made[0]["seconds"]}
        for count, made in reports.items()
    }
    alone, shared = seconds[1], seconds[args.processes]
    ranks = [{row["path"]: row["rank"] for row in made[0]["targets"]} for made in reports.values()]
    found = {
        "options": options,
        "times as fast": {part: round(alone[part] / shared[part], 2) for part in alone if shared[part] > 0},
        "in all": round(sum(alone.values()) / sum(shared.values()), 2),
        "seconds": {part: round(value, 1) for part, value in alone.items()},
        "same ranks": ranks[0] == ranks[1],
        "perplexity": [made[0]["after"]["perplexity"]["perplexity"] for made in reports.values() if made[0]["after"]],
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
