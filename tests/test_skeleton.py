"""The scripts share one skeleton: banners in order, fenced blocks byte for byte as in simclr.py.

python tests/test_skeleton.py --fix     copies simclr.py's fenced blocks into the others
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REFERENCE = "simclr.py"
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py"))
BANNERS = ["config", "loss", "model", "train"]
FENCE = re.compile(r"^ *# --- shared: (.+?) ---\n(.*?)^ *# --- end shared ---\n", re.M | re.S)


def source(name):
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_banners_stand_in_order(name):
    assert re.findall(r"^# =+ (\w+) =+$", source(name), re.M) == BANNERS


@pytest.mark.parametrize("name", SCRIPTS)
def test_fenced_blocks_are_those_of_the_reference(name):
    reference, blocks = dict(FENCE.findall(source(REFERENCE))), FENCE.findall(source(name))
    assert [title for title, _ in blocks] == list(reference)
    for title, block in blocks:
        assert block == reference[title], f"{name}: block '{title}' differs from {REFERENCE}"
    assert len(reference) >= 8


@pytest.mark.parametrize("name", SCRIPTS)
def test_fences_are_closed_and_only_call(name):
    text = source(name)
    assert len(FENCE.findall(text)) == text.count("# --- shared:") == text.count("# --- end shared")
    for title, block in FENCE.findall(text):
        assert not re.search(r"\b(def|class|lambda)\b", block), f"{title}: a block only calls"


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_does_nothing(name):
    docstring, *body, guard = ast.parse(source(name)).body
    assert isinstance(docstring.value, ast.Constant)
    assert {type(n) for n in body} <= {ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef}
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    main()"


def fix():
    """Copy the reference's blocks into the other scripts."""
    reference = {m[1]: m[0] for m in FENCE.finditer(source(REFERENCE))}
    for name in SCRIPTS:
        fixed = FENCE.sub(lambda m: reference.get(m[1], m[0]), source(name))
        if fixed != source(name):
            (ROOT / name).write_text(fixed)
            print(f"{name}: fenced blocks copied from {REFERENCE}")


if __name__ == "__main__" and sys.argv[1:] == ["--fix"]:
    fix()
