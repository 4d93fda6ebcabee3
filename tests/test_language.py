"""A glossary for everything that people read: pages, docstrings, error messages and help."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "slimrank"
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
BETTER = {  # a pattern of what not to write -> what to write
    r"kept aside": "held-out",
    r"in (the|its|their) place of": "instead of",
    r"put (it )?in (its|their) place\b": "replace",
    r"(?<!there )(is|are|was|were) no (?!longer|more\b|fewer\b|nearer|farther|smaller|larger|better|worse)": "is not a",
    r"fore(tell|tells|told)": "estimate",
    r"mostly": "usually",
    r"(stands?|stood) in (several|many|more|so many) places": "tied",
    r"stands? (behind|beside|below|above|under) (it|the|its)\b": "is",
    r"answers? (what|with|to the same)": "output",
    r"what (it|they|a layer|each layer|the layer) (reads?|answers?)\b": "input, output",
    r"(as|the way) (it was|they were) cut|after the cut|before the cut": "factorise, truncate",
    r"leans? on": "are shrunk towards",
    r"hands? (it |them )?on\b|handed on\b|handed out\b": "pass on, spend",
    r"of one's own": "your own",
    r"that is all there is|all there is\b": "everything",
    r"(has|have) (it|them) all the same": "still",
    r"nothing but\b(?! None| torch)": "only",
    r"without a word": "silently",
    r"by themselves become|by itself becomes": "automatically",
    r"(cannot|could not) be had": "is not available",
    r"what (came|comes|has come) of (it|them)": "result",
    r"was made by other inputs": "belongs to a different run",
    r"(can|could|may) be told\b|cannot be told": "is known",
    r"goes by (the|a|what|spectra)": "uses",
    r"so much more is done": "advance by",
    r"at fault": "wrong",
    r"but for (?!that|this reason)": "except",
    r"once more": "again",
    r"(does|do) not go with": "cannot be combined",
    r"whatever else": "anything else",
    r"what there is to (tell|say|report|allocate)": "name it",
    r"knows (the )?model\b": "holds the model",
    r"the words?,? the rooms?": "packages",
}


def found_in(text: str) -> list[str]:
    """List what a text should say otherwise."""
    plain = re.sub(r"\s+", " ", text)
    return [
        f"'{match.group()}' in '...{plain[max(0, match.start() - 40) : match.end() + 40]}...': write {better}"
        for pattern, better in BETTER.items()
        for match in re.finditer(rf"\b(?:{pattern})", plain, flags=re.IGNORECASE)
    ]


SOURCES = sorted(PACKAGE.rglob("*.py"))


def strings_of(tree: ast.Module):
    """Yield the docstrings and all other strings of two words or more; the constant parts of f-strings, joined."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages(page):
    text = re.sub(r"^```.*?^```|\"[^\"\n]*\"", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not found_in("\n".join(line for line in text.splitlines() if not line.startswith("    ")))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_errors_and_help(path):
    assert not [found for text in strings_of(ast.parse(path.read_text("utf-8"))) for found in found_in(text)]


NOT_A_VERB = re.compile(
    r"(The|A|An|What|Whether|Where|How|All|Some|Those|That|So|About|As|Every|Each|Its|No|One|Which|Why|Up|By|For)\b|[a-z_|(+]"
    r"|(Budget|Code|Effect|Error|Improved|Isotonic|KL|Next|Nothing|Of|Optimum|Shape|Smallest|Spectral|T)\b"
    r"|(?!\w*ss\b)[A-Z]\w*s\b"  # a plural noun, or a verb in the third person
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_of_functions_begin_with_a_verb(path):
    """Ruff's D401 knows common words only. Properties are exempt, as there."""
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and not any("property" in ast.dump(d) for d in node.decorator_list)
    ]
    docstrings = {node.name: ast.get_docstring(node) or "Return" for node in functions}
    assert not {name: text for name, text in docstrings.items() if NOT_A_VERB.match(text)}


def test_the_glossary_finds_what_it_forbids():
    assert all(found_in(text) for text in ("Four windows are\nkept aside.", "This is no error.", "plan foretells"))
    assert not found_in("There is no room. It is no longer there. It is no more than one.")
