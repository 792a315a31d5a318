"""Figures of ``diptych data stats`` as short tables."""

import sys
from typing import Any

__all__ = ["print_figures"]


def print_figures(figures: dict[str, Any]) -> None:
    """Statistics as short tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=110)

    def table(title: str, *names: str) -> Table:
        made = Table(title=title, title_justify="left", header_style="", box=None, pad_edge=False)
        for number, name in enumerate(names):
            made.add_column(name, justify="right" if number else "left")
        return made

    size = figures["bytes"] / 1e6
    formats = ", ".join(f"{name} {count}" for name, count in figures["formats"].items())
    console.print(
        f"{figures['folder']}: {figures['samples']} samples in {figures['shards']} shards, "
        f"{size:.1f} MB ({formats})",
        markup=False,
        soft_wrap=True,
    )
    shown = table("Quantiles", "", "least", "5 %", "25 %", "median", "75 %", "95 %", "most")
    for name, key in (
        ("shorter side, pixels", "shorter_side"),
        ("width / height", "aspect_ratio"),
        ("image, bytes", "image_bytes"),
        ("caption, characters", "caption_characters"),
        ("caption, words", "caption_words"),
    ):
        shown.add_row(name, *(f"{figures[key][f'p{q}']:g}" for q in (0, 5, 25, 50, 75, 95, 100)))
    console.print("", shown)
    for title, key in (("Shorter side", "shorter_side"), ("Caption characters", "caption_characters")):
        shown = table(title, "from-to", "samples", "")
        histogram = figures[key]["histogram"]
        for name, count in histogram.items():
            if count:
                shown.add_row(name, str(count), "#" * max(1, round(40 * count / max(histogram.values()))))
        shown.columns[2].justify = "left"
        console.print("", shown)
    for name, key in (("copied images", "copied_images"), ("repeated captions", "repeated_captions")):
        got = figures[key]
        console.print(f"{name}: {got['count']} ({100 * got['rate']:.2f} %)", markup=False)
    if figures["commonest_captions"]:
        shown = table("Commonest captions", "caption", "times")
        for text, times in figures["commonest_captions"].items():
            shown.add_row(Text(" ".join(text.split())), str(times))
        console.print("", shown)
    if figures["json"]:
        shown = table("Fields of the JSON", "field", "in", "distinct")
        shown.add_column("commonest", overflow="ellipsis", no_wrap=True)
        for name, got in figures["json"].items():
            commonest = ", ".join(got.get("commonest", {}))
            shown.add_row(name, f"{100 * got['in']:.1f} %", str(got.get("distinct", "")), commonest)
        console.print("", shown)
