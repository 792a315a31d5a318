"""Text files are plain: UTF-8, line feeds, no loose ends, nothing of anybody's machine."""

import re
from pathlib import Path

from .repository import ROOT, tracked

BINARY = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".parquet", ".tar", ".idx", ".safetensors", ".gz"}
LOOSE_ENDS = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b|^(?:<{7}|>{7}) ", re.MULTILINE)
SOMEBODYS_PATH = re.compile(r"(?<![\w.~:$}])/(?:home|root|work|opt|Users)/\w")


def texts() -> list[tuple[Path, str]]:
    return [(p, (ROOT / p).read_bytes().decode("utf-8")) for p in tracked() if p.suffix not in BINARY]


def test_text_files_are_tidy() -> None:
    wrong: list[str] = []
    for path, text in texts():
        if "\r" in text or "\0" in text:
            wrong.append(f"{path}: other characters than text with line feeds")
        if text and (not text.endswith("\n") or text.endswith("\n\n")):
            wrong.append(f"{path}: does not end with one line feed")
        for number, line in enumerate(text.split("\n"), start=1):
            if line != line.rstrip() and path.suffix != ".svg":
                wrong.append(f"{path}:{number}: white space at the end")
            if "\t" in line and path.name != "Makefile":
                wrong.append(f"{path}:{number}: tab")
    assert wrong == []


def test_nothing_is_left_for_later_and_no_path_is_of_one_machine() -> None:
    found = [
        f"{path}: {match[0]}"
        for path, text in texts()
        for pattern in (LOOSE_ENDS, SOMEBODYS_PATH)
        for match in pattern.finditer(text)
    ]
    assert found == []


def test_no_file_is_big() -> None:
    big = {str(path): size for path in tracked() if (size := (ROOT / path).stat().st_size) > 1_000_000}
    assert big == {}
