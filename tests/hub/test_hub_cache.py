"""Compressed models of the hub, out of a cache that is laid out by hand, with and without slimrank."""

import hashlib
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import slimrank
from helpers import byte_tokenizer, tiny_model

IDS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
REVISIONS = {"main": {}, "pivot": {"form": "pivot"}, "int8": {"quantize": "int8"}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A home of the hub's files with one repository of several branches, each with a model of its own."""
    home = tmp_path_factory.mktemp("home")
    repo = home / "hub" / "models--org--small"
    (repo / "refs").mkdir(parents=True)
    for name, options in REVISIONS.items():
        commit = hashlib.sha1(name.encode()).hexdigest()
        (repo / "refs" / name).write_text(commit)
        model = slimrank.compress(
            tiny_model(), byte_tokenizer(), keep_ratio=0.6, method="svd",
            evaluation=None, seq_len=16, out=repo / "snapshots" / commit, **options,
        ).model  # fmt: skip
        with torch.no_grad():
            torch.save(model(input_ids=IDS).logits, home / f"{name}.pt")
    return home


def python(program, home, *arguments):
    """Run a program offline with this home, in a process of its own."""
    about = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(home / "modules")}
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"}
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    result = subprocess.run(command, env=kept | about, capture_output=True, text=True, cwd=home)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_slimrank_by_remote_code_and_revision(cache):
    python(
        """
        import sys
        sys.modules["slimrank"] = None  # as where it is not installed
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
        for name in sys.argv[1:]:
            for given in ({}, {"code_revision": name}) if name != "main" else ({},):
                given = given if name == "main" else {"revision": name, **given}
                model = AutoModelForCausalLM.from_pretrained("org/small", trust_remote_code=True, **given)
                with torch.no_grad():
                    torch.testing.assert_close(model(input_ids=ids).logits, torch.load(name + ".pt"))
                assert type(model).__module__.startswith("transformers.models.llama")
            assert len(AutoTokenizer.from_pretrained("org/small", revision=name)) == 259
        """,
        cache,
        *REVISIONS,
    )


def test_with_slimrank(cache):
    """It loads by name, and slimrank itself measures it by name."""
    python(
        """
        import sys
        import slimrank, torch
        from transformers import AutoModelForCausalLM

        ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
        loaded = [AutoModelForCausalLM.from_pretrained("org/small"), slimrank.load("org/small")[0]]
        for model in loaded:
            with torch.no_grad():
                torch.testing.assert_close(model(input_ids=ids).logits, torch.load("main.pt"))
        """,
        cache,
    )
