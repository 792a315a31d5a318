"""Tables of docs/performance.md and docs/reliability.md, and the plot, from the newest rows of
benchmarks/results.

    python benchmarks/plot.py

Each block of a document between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is written anew; blocks
whose benchmark has no row yet stay as they are. The plot is docs/images/performance.svg.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import RESULTS

DOCS = Path(__file__).resolve().parents[1] / "docs"
Row = dict[str, Any]
KINDS = {"open_clip": "open_clip 3.3.0", "exact": "exact", "masked": "half of the patches"}
COLOURS = {"open_clip": "#8a8f98", "exact": "#2f6fb3", "masked": "#d9822b"}


def newest(benchmark: str, keys: tuple[str, ...] = (), results: Path = RESULTS) -> list[Row]:
    """The newest row of each combination of values of ``keys``, in order of first appearance; without those
    of --quick runs."""
    file = results / f"{benchmark}.jsonl"
    found: dict[Any, Row] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        row = json.loads(line)
        if row.get("model") != "quick" and not row.get("quick"):
            found[tuple(row.get(key) for key in keys)] = row
    return list(found.values())


def table(head: list[str], lines: list[list[Any]]) -> str:
    """Markdown; numbers with three digits that count."""
    rows = [head, ["---"] * len(head), *([cell(value) for value in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def steps(results: Path) -> list[Row]:
    """The newest of each model on each machine, model by model."""
    rows = newest("train_step", ("model", "machine"), results)
    first = list(dict.fromkeys(row["model"] for row in rows))
    return sorted(rows, key=lambda row: first.index(row["model"]))


def maker(row: Row) -> str:
    """Whose processor a row was measured on."""
    return "AMD" if "AMD" in row["machine"] else "Intel" if "Intel" in row["machine"] else row["machine"]


def step_table(results: Path) -> str:
    """Speeds, memory and roof of a step."""
    lines: list[list[Any]] = []
    for row in steps(results):
        for kind, label in KINDS.items():
            suffix = {"open_clip": "_open_clip", "exact": "", "masked": "_masked"}[kind]
            speedup = row.get(f"speedup_{kind}")
            lines.append(
                [
                    f"{row['model']}, batch {row['batch_size']}",
                    maker(row),
                    label,
                    row["samples_per_cpu_second"][kind],
                    f"**{speedup:.2f}**" if speedup else "1",
                    row["memory_mib"][kind],
                    f"{row['memory_mib'][kind] / row['memory_mib']['open_clip']:.2f}",
                    row["gflop_per_sample"][kind],
                    row[f"roof_ratio{suffix}"],
                ]
            )
    head = ["model", "CPU", "step", "samples / CPU s", "times open_clip", "peak MiB", "of open_clip's"]
    return table([*head, "GFLOP / sample", "times its roof"], lines)


def difference_table(results: Path) -> str:
    rows = steps(results)
    lines = [
        [row["model"], row["machine"], f"{row['difference_fp64']:.1e}", row["gemm_gflops"]] for row in rows
    ]
    head = [
        "model",
        "machine",
        "largest difference of a parameter after 5 steps in fp64",
        "GEMM peak, GFLOP/s, one thread",
    ]
    return table(head, lines)


def shares_table(results: Path) -> str:
    """Where the processor time of a step goes."""
    rows = steps(results)
    parts = list(rows[0]["shares"]["exact"]) if rows else []
    lines = [
        [row["model"], maker(row), KINDS[kind], *(f"{row['shares'][kind][part]:.1%}" for part in parts)]
        for row in rows
        for kind in KINDS
    ]
    return table(["model", "CPU", "step", *parts], lines)


def end_to_end_table(results: Path) -> str:
    lines: list[list[Any]] = []
    for row in newest("end_to_end", ("model",), results):
        speedups = {
            "open_clip": "1",
            "exact": f"**{row['speedup']:.2f}**",
            "masked": f"{row['speedup_masked']:.2f}",
        }
        for kind, label in KINDS.items():
            rates = [row["samples_per_cpu_second"][kind], speedups[kind], row["peak_rss_mib"][kind]]
            lines.append([label, *rates])
    return table(["training", "samples / CPU s", "times open_clip", "peak RSS, MiB"], lines)


def loss_table(results: Path) -> str:
    lines = [
        [row["batch"], row.get("speedup"), row.get("memory_ratio")]
        for row in newest("loss", ("batch",), results)
    ]
    return table(["batch", "times ClipLoss's speed", "peak memory, share of ClipLoss's"], lines)


def ranks_table(results: Path) -> str:
    """The loss over several processes: what each way moves, takes and holds."""
    row = newest("loss", (), results)[-1]
    names = {"open_clip": "open_clip 3.3.0, local loss", "gather": "gather", "ring": "ring"}
    lines = [
        [
            int(ranks),
            label,
            of["mb_moved"][kind],
            of["cpu_s"][kind],
            of.get(f"speedup_{kind}", 1),
            of["wall_s"][kind],
            of["mib"][kind],
        ]
        for ranks, of in row.get("ranks", {}).items()
        for kind, label in names.items()
    ]
    head = [
        "processes",
        "exchange",
        "MB moved by each",
        "CPU s in all",
        "times open_clip",
        "wall s",
        "peak MiB",
    ]
    return table(head, lines)


def scalars_table(benchmark: str, results: Path) -> str:
    """All plain numbers of the newest row."""
    skip = ("benchmark", "date", "machine")
    rows = newest(benchmark, (), results)
    plain = [
        [k, v] for row in rows for k, v in row.items() if k not in skip and not isinstance(v, (dict, list))
    ]
    return table(["figure", "value"], plain)


def accuracy_table(results: Path) -> str:
    lines: list[list[Any]] = []
    for row in newest("time_to_accuracy", (), results):
        end = row["open_clip_s"]
        lines.append(["open_clip's recipe", f"{end:.0f}", f"{row['target_score']:.3f}", f"{end:.0f}", "1"])
        for line in row["table"]:
            to = line["to_target_s"]
            name = f"**{line['name']}**" if line["name"] == "Diptych" else line["name"]
            lines.append(
                [
                    name,
                    f"{line['cpu']:.0f}",
                    f"{line['score']:.3f}",
                    "not reached" if to is None else f"{to:.0f}",
                    f"{line['speedup']:.2f}" if to else "",
                ]
            )
    return table(
        ["recipe", "CPU s in all", "score at the end", "CPU s to open_clip's score", "speedup"], lines
    )


def faults_table(results: Path) -> str:
    """What each fault did to each trainer."""
    names = {"diptych": "Diptych", "open_clip": "open_clip 3.3.0", "accelerate": "Accelerate"}
    (row,) = newest("faults", (), results)
    lines = [
        [row["faults_told"][fault], *(outcome(of.get(kind)) for kind in names)]
        for fault, of in row["faults"].items()
    ]
    return table(["fault", *names.values()], lines)


def outcome(one: Row | None) -> str:
    """What a fault did, in words."""
    if one is None:
        return "has none"
    if not one["survived"]:
        tries = one.get("tries", 1)
        failed = tries - one.get("tries_survived", 0)
        often = f" in {failed} of {tries} tries" if tries > 1 else ""
        return f"**lost**{often}" if one["difference"] is None or tries > 1 else "**weights lost**"
    if (off := one["difference"]) > 1:
        return "**weights destroyed**, not a word of it"
    words = ["the same bits" if off == 0 else f"weights {off:.1%} off"]
    if one["steps_again"]:
        words.append(f"{one['steps_again']} steps again")
    for what, told in (("missing", "samples missed"), ("repeated", "seen twice")):
        if one[what]:
            words.append(f"{one[what]} {told}")
    return ", ".join(words)


def soak_table(results: Path) -> str:
    """The newest soak."""
    (row,) = newest("soak", (), results)
    lines: list[list[Any]] = [
        ["steps, on so many processes", f"{row['steps']:,} on {row['ranks']}"],
        ["kills", row["kills"]],
        ["of them with half a checkpoint left behind", row["kills_that_left_half_a_checkpoint"]],
        [
            "most steps that one kill cost (allowed)",
            f"{row['most_steps_lost']} ({row['steps_lost_allowed']})",
        ],
        ["differences to the undisturbed run", len(row["differences"])],
        ["temporary files and processes left", len(row["left_over"])],
        ["files left in /dev/shm", len(row["shm_files_left"])],
        ["growth of memory over the undisturbed run", f"{row['memory_growth'] - 1:.1%}"],
    ]
    return table(["", f"{row['date'][:10]}, {maker(row)}"], lines)


def overhead_table(results: Path) -> str:
    """What each guard of a run costs."""
    (row,) = newest("overhead", (), results)
    told = {
        "guard": "steps that are not finite, spikes",
        "flags": "how saves stand, agreed on in every step",
        "stop": "signals",
        "metrics": "writing metrics",
        "watch": "watchdog, stragglers",
        "replicas": "comparing the processes",
        "copying": "copying the state for a checkpoint",
        "writing": "writing, hashing and syncing it, beside the training",
    }
    lines: list[list[Any]] = [[told[part], f"{share:.3%}"] for part, share in row["shares"].items()]
    return table(["", "share"], [*lines, ["in all", f"**{row['share']:.2%}**"]])


BLOCKS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "step": ("train_step", step_table),
    "difference": ("train_step", difference_table),
    "shares": ("train_step", shares_table),
    "end_to_end": ("end_to_end", end_to_end_table),
    "loss": ("loss", loss_table),
    "ranks": ("loss", ranks_table),
    "grad_cache": ("grad_cache", lambda results: scalars_table("grad_cache", results)),
    "compile": ("compile", lambda results: scalars_table("compile", results)),
    "time_to_accuracy": ("time_to_accuracy", accuracy_table),
    "faults": ("faults", faults_table),
    "soak": ("soak", soak_table),
    "overhead": ("overhead", overhead_table),
}


def fill(text: str, results: Path = RESULTS) -> str:
    """The document with its blocks written anew."""
    for name, (benchmark, make) in BLOCKS.items():
        if newest(benchmark, (), results):
            block = f"<!-- begin {name} -->\n\n{make(results)}\n\n<!-- end {name} -->"
            pattern = rf"<!-- begin {name} -->.*?<!-- end {name} -->"
            text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def svg(results: Path = RESULTS) -> str:
    """Speed-ups as bars, and score over processor seconds as curves."""
    parts = [
        '<g font-family="sans-serif" font-size="12" fill="#333">',
        *_bars(20, results),
        *_curves(430, results),
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 300" width="860" height="300">\n'
        '<rect width="860" height="300" fill="#ffffff"/>\n' + "\n".join([*parts, "</g>"]) + "\n</svg>\n"
    )


def _bars(left: int, results: Path) -> list[str]:
    bars: list[tuple[str, str, float]] = []
    for row in steps(results):
        bars += [
            (f"{row['model']} {maker(row)}", kind, row[f"speedup_{kind}"]) for kind in ("exact", "masked")
        ]
    for row in newest("end_to_end", ("model",), results):
        bars += [("whole run", "exact", row["speedup"]), ("whole run", "masked", row["speedup_masked"])]
    out = [f'<text x="{left}" y="24" font-size="14">Samples per CPU second, open_clip = 1</text>']
    widest = max([value for *_, value in bars], default=1.0)
    for i, (name, kind, value) in enumerate(bars):
        y, width = 40 + 22 * i, 190 * value / widest
        label = name if i % 2 == 0 else ""
        out += [
            f'<text x="{left}" y="{y + 13}">{label}</text>',
            f'<rect x="{left + 120}" y="{y}" width="{width:.1f}" height="17" fill="{COLOURS[kind]}"/>',
            f'<text x="{left + 126 + width:.1f}" y="{y + 13}">{value:.2f}</text>',
        ]
    for i, kind in enumerate(("exact", "masked")):
        x = left + 120 + 90 * i
        out += [
            f'<rect x="{x}" y="272" width="12" height="12" fill="{COLOURS[kind]}"/>',
            f'<text x="{x + 18}" y="282">{KINDS[kind]}</text>',
        ]
    return out


def _curves(left: int, results: Path) -> list[str]:
    rows = newest("time_to_accuracy", (), results)
    out = [f'<text x="{left}" y="24" font-size="14">Held-out retrieval score over CPU seconds</text>']
    if not rows:
        return out
    curves: dict[str, list[Row]] = rows[0]["curves"]
    right, top = (
        max(r["cpu"] for c in curves.values() for r in c),
        max(r["score"] for c in curves.values() for r in c),
    )
    across, height, bottom = 340, 190, 250

    def place(cpu: float, score: float) -> str:
        return f"{left + 40 + across * cpu / right:.1f},{bottom - height * score / top:.1f}"

    axes = f"M{left + 40} {bottom - height}V{bottom}H{left + 40 + across}"
    out.append(f'<path d="{axes}" fill="none" stroke="#999"/>')
    for share in (0.5, 1.0):
        x, y = left + 40 + across * share, bottom - height * share
        out += [
            f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{right * share:.0f} s</text>',
            f'<text x="{left + 34}" y="{y + 4}" text-anchor="end">{top * share:.2f}</text>',
        ]
    target = place(right, rows[0]["target_score"]).partition(",")[2]
    out.append(f'<path d="M{left + 40} {target}H{left + 40 + across}" stroke="#bbb" stroke-dasharray="4 4"/>')
    for i, (name, colour) in enumerate((("open_clip", COLOURS["open_clip"]), ("diptych", COLOURS["exact"]))):
        points = " ".join([place(0, 0), *(place(r["cpu"], r["score"]) for r in curves[name])])
        label = {"open_clip": "open_clip's recipe", "diptych": "Diptych's"}[name]
        x = left + 40 + 140 * i
        out += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>',
            f'<rect x="{x}" y="272" width="12" height="12" fill="{colour}"/>',
            f'<text x="{x + 18}" y="282">{label}</text>',
        ]
    return out


def main() -> None:
    for document in (DOCS / "performance.md", DOCS / "reliability.md"):
        document.write_text(fill(document.read_text()))
    (DOCS / "images" / "performance.svg").write_text(svg())
    print("written: docs/performance.md with its plot, docs/reliability.md")


if __name__ == "__main__":
    main()
