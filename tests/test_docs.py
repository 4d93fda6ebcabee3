"""The pages of docs/ say what the code does: commands parse, tables are those of the code, names are there."""

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.main import get_command

import slimrank
from helpers import save_tiny
from slimrank.cli.app import app
from slimrank.cli.recipe_flags import parameters, recipe_flags
from slimrank.recipe import BUDGETS, Recipe
from slimrank.recipe_presets import PRESETS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMMANDS = get_command(app).commands
RECIPE = parameters()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page):
    """Every command line of a page: those of shell blocks, and indented lines that begin with slimrank."""
    text = "".join(blocks(page, "sh")) + "\n".join(re.findall(r"^ {4}(slimrank .*)$", page.read_text(), re.MULTILINE))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_every_command_parses(page, monkeypatch):
    monkeypatch.setattr(Recipe, "read", classmethod(lambda cls, path: {}))
    for words in commands(page):
        if words[0] != "slimrank":
            assert words[0] in ("pip", "make"), words
            continue
        context = COMMANDS[words[1]].make_context(
            words[1], words[2:]
        )  # an unknown option, or a missing one, ends it here
        if words[1] == "compare":  # its sizes are lists
            continue
        flags = {name: value for name, value in context.params.items() if name in RECIPE}
        Recipe.make(recipe_flags(**flags))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_every_recipe_is_one(page):
    for block in blocks(page, "yaml"):
        if "\ntask:" not in f"\n{block}":  # those are of lm-evaluation-harness
            Recipe.make(yaml.safe_load(block))


def flag_of_every_field():
    """Find each by giving it alone; hidden flags, which have former names, are left out."""
    flags = {}
    options = {parameter.name: parameter.opts[0] for parameter in COMMANDS["compress"].params if not parameter.hidden}
    for name, parameter in RECIPE.items():
        kind = get_args(parameter.annotation)[0]
        value = ["a=1"] if "list" in str(kind) else True if kind is bool else 1
        if name in options and name not in ("preset", "recipe", "no_eval"):
            (field,) = recipe_flags(**{name: value})
            flags[field] = options[name]
    return flags


def default_of(field):
    default = Recipe.model_fields[field].default
    return default if isinstance(default, str) else json.dumps(default)


def table_of_options():
    flags = flag_of_every_field()
    rows = ["| option | flag | default | what it is |", "|---|---|---|---|"]
    for name, field in Recipe.model_fields.items():
        rows.append(f"| `{name}` | `{flags[name]}` | {default_of(name)} | {field.description} |")
    return "\n".join(rows)


def table_of_presets():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(PRESETS.glob("*.yaml"))}
    return "\n".join(
        f"| `{name}` | " + ", ".join(f"`{key}: {value}`" for key, value in options.items()) + " |"
        for name, options in files.items()
    )


def test_the_page_of_recipes_has_every_option_and_preset():
    page = (DOCS / "recipes.md").read_text("utf-8")
    assert table_of_options() in page, f"docs/recipes.md needs this table:\n{table_of_options()}"
    assert table_of_presets() in page, f"docs/recipes.md needs these rows:\n{table_of_presets()}"
    assert all(f"`{name}`" in page for name in BUDGETS)


def test_the_reference_has_every_public_name():
    page = (DOCS / "api.md").read_text("utf-8")
    named = set(re.findall(r"^::: slimrank\.(\w+)$", page, flags=re.MULTILINE)) - {"errors"}
    assert named == set(slimrank.__all__) - {"__version__"}


def links():
    for page in [*PAGES, *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"]:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not link.startswith(("http://", "https://")):
                yield page, link


def test_messages_in_troubleshooting_are_those_of_the_code():
    """Between numbers and dots, each quoted part of a heading stands in a source; peft and transformers have theirs."""
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    headings = re.findall(r"^## (?!LoRA)(.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [message for heading in headings for message in re.findall(r'"([^"]+)"', heading)]
    parts = [part.strip() for message in quoted for part in re.split(r"\.\.\.|\b\d+\b", message)]
    assert len(parts) > 20
    assert [part for part in parts if part not in code] == ["contains custom code"]


def test_every_relative_link_leads_to_a_file():
    """On GitHub; `make docs` holds the site to the same, anchors and all."""
    broken = [(str(page), link) for page, link in links() if not (page.parent / link.partition("#")[0]).exists()]
    assert not broken


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert named >= {str(page.relative_to(ROOT)) for page in PAGES}
    assert all((ROOT / name).is_file() for name in named)


def test_the_python_of_the_new_pages_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slimrank.compress(save_tiny(tmp_path / "tiny"), keep_ratio=0.6, method="svd", evaluation=None, out="smaller")
    for name in ("getting-started", "saved-models", "recipes"):
        found = blocks(DOCS / f"{name}.md", "python")
        assert found
        for block in found:
            exec(block, {})
    assert (tmp_path / "again" / "config.json").is_file()
