"""Documents: links lead somewhere, commands parse, targets exist."""

import re
from pathlib import Path

import pytest

from .commands import check_words, diptych_words, joined_lines
from .repository import ROOT, tracked

DOCUMENTS = [path for path in tracked() if path.suffix == ".md"]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)|<(?:img|a)\s[^>]*?(?:src|href)=\"(?P<html>[^\"]+)\"")


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Anchors of a document's headings, made the way GitHub does."""
    headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_local_links_lead_somewhere(path: Path) -> None:
    dead: list[str] = []
    for match in LINK.finditer(FENCE.sub("", read(path))):
        target = match["target"] or match["html"]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / path.parent / name).resolve() if name else ROOT / path
        known = file.exists() and (file.is_dir() or file.relative_to(ROOT) in tracked())
        if not known or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_commands_in_fences_are_understood(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(Path("Makefile")), re.MULTILINE))
    for fence in FENCE.finditer(read(path)):
        if fence["language"] not in ("", "sh", "bash", "console", "shell"):
            continue
        for line in joined_lines(fence["body"]):
            words = diptych_words(line)
            if words is not None:
                check_words(words)
            elif line.startswith("make "):
                asked = [word for word in line.partition("#")[0].split()[1:] if "=" not in word]
                assert set(asked) <= targets, line


def test_python_in_fences_compiles() -> None:
    for path in DOCUMENTS:
        for fence in FENCE.finditer(read(path)):
            if fence["language"] == "python":
                compile(fence["body"], str(path), "exec")


def test_every_document_is_listed() -> None:
    """Pages in docs/ by docs/README.md, those in a folder docs/NAME/ by docs/NAME.md."""
    missing: list[str] = []
    for path in DOCUMENTS:
        if path.parts[0] == "docs" and path.name != "README.md":
            within = path.relative_to("docs")
            index = Path("docs/README.md") if len(within.parts) == 1 else path.parent.with_suffix(".md")
            if f"({within})" not in read(index):
                missing.append(str(path))
    assert missing == []
