"""The report is one valid, self-contained page that shows what is there, escapes it, and says what is not."""

import json
import os
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from diptych.configs.errors import UserError
from diptych.finetune.report.charts import Series, interval_bar, line_chart, nice_ticks, short_number
from diptych.finetune.report.folds import fold_section, gain_tile
from diptych.finetune.report.page import newest_runs, write_report
from diptych.finetune.scores.results import headline
from diptych.finetune.scoring import fusion_gain

from .report_runs import make_finetune, make_pretrain

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags, attributes and text; complains about tags that do not close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> was never opened"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_both_runs_on_one_page_that_asks_nothing_of_the_network(tmp_path: Path) -> None:
    path = write_report([make_pretrain(tmp_path / "pre"), make_finetune(tmp_path / "fine")])
    assert path == tmp_path / "pre" / "report.html"
    page = Page(path)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "action", "data", "srcset"):
                assert value is not None
                assert value.startswith("data:image/png;base64,")
    assert "http" not in path.read_text().replace("http-equiv", "")
    for words in (
        "R@5 image to text, pets",
        "41.0 %",
        "chance 1.0 %",
        "gated",
        "+13.0 %",
        "62.0 to 64.0",
        "97",
    ):
        assert words in page.text
    figures = [a for tag, a in page.tags if tag == "figure" and a.get("class") == "chart"]
    assert len(figures) == 6  # loss, two recalls, learning rate, logit scale, throughput
    assert sum(tag == "img" for tag, _ in page.tags) == 4 + 4 * 5


def test_the_chosen_head_is_tinted_and_its_gain_stands_beside_its_interval(tmp_path: Path) -> None:
    page = Page(write_report([make_finetune(tmp_path / "fine")]))
    tinted = [i for i, (tag, a) in enumerate(page.tags) if tag == "tr" and a.get("class") == "best"]
    assert len(tinted) == 1
    assert "12.0 to 14.0 against text" in page.text
    assert "No pretraining run given" in page.text


@pytest.mark.parametrize(("groups", "judged"), [(9, False), (10, True)])
def test_a_gain_from_few_groups_gets_no_verdict(groups: int, judged: bool, tmp_path: Path) -> None:
    folder = make_finetune(tmp_path / "fine")
    results = json.loads((folder / "results.json").read_text())
    results |= {"type": "multiclass", "classes": ["a", "b"], "n_test_groups": groups}
    for head in results["heads"].values():
        head.get("vs_best_single", {})["metric"] = "accuracy"
    gain, said = fusion_gain(results), headline(results)
    assert gain is not None
    few, verdict = f"too few groups ({groups}) for a verdict", "better than the best single modality, text."
    assert (few in gain["text"], "95 % interval +12.0 to +14.0" in gain["text"]) == (not judged, judged)
    assert "+13.0 points of accuracy" in gain["text"]
    assert (few in said, "(+12.0 to +14.0)" in said, verdict in said) == (not judged, judged, judged)
    assert "that is +13.0 points" in said
    (folder / "results.json").write_text(json.dumps(results | {"fusion_gain": gain}))
    page = Page(write_report([folder]))
    assert ("12.0 to 14.0" in page.text, few in page.text) == (judged, not judged)
    assert any(tag == "span" and a.get("class") == "good" for tag, a in page.tags) == judged


def test_several_runs_of_a_kind_stand_under_their_names(tmp_path: Path) -> None:
    runs = [make_pretrain(tmp_path / name, steps=60) for name in ("short", "long")]
    page = Page(write_report(runs))
    assert sum(tag == "h2" and a.get("class") == "run" for tag, a in page.tags) == 2
    assert page.text.index("short") < page.text.index("long")


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script>"onerror="x&'
    pre, fine = make_pretrain(tmp_path / "pre", name=evil), make_finetune(tmp_path / "fine", name=evil)
    (pre / "config.yaml").write_text(f"name: '{evil}'\n")
    evaluation = json.loads((pre / "evaluate.json").read_text())
    evaluation["retrieval"] = {evil: evaluation["retrieval"]["pets"]}
    evaluation["zero_shot"] = {evil: evaluation["zero_shot"]["pets/subgroup"] | {"classes": evil, "n": evil}}
    evaluation["notes"] = [evil]
    evaluation["model"] = {"image": evil, "text": evil, "parameters": 1, "image_size": evil}
    (pre / "evaluate.json").write_text(json.dumps(evaluation))
    results = json.loads((fine / "results.json").read_text())
    results |= {"headline": evil, "task": evil}
    results["heads"]["late"] |= {"op": evil, "params": evil, "seconds": evil}
    results["heads"]["late"]["vs_best_single"]["against"] = evil
    (fine / "results.json").write_text(json.dumps(results))
    path = write_report([pre, fine])
    page = Page(path)
    assert "<script" not in path.read_text()
    assert not [a for _, a in page.tags if "onerror" in a]
    assert page.text.count(evil) >= 10


def test_pictures_outside_of_the_run_folder_and_files_that_are_no_pictures_stay_out(tmp_path: Path) -> None:
    pre = make_pretrain(tmp_path / "pre")
    (tmp_path / "secret.png").write_bytes((pre / "evaluate/thumbs/0.png").read_bytes())
    (pre / "evaluate/thumbs/1.png").write_text("root:x:0:0")
    evaluation = json.loads((pre / "evaluate.json").read_text())
    entries = [e for e in evaluation["examples"] if e["direction"] == "image_to_text"]
    entries[0]["picture"], entries[2]["picture"] = "../secret.png", "/etc/hostname"
    evaluation["examples"] = entries
    (pre / "evaluate.json").write_text(json.dumps(evaluation))
    page = Page(write_report([pre]))
    assert sum(tag == "img" for tag, _ in page.tags) == 1  # the fourth


def test_absent_parts_become_one_line_that_says_how_to_get_them(tmp_path: Path) -> None:
    run = tmp_path / "young"
    (run / "checkpoints").mkdir(parents=True)
    text = Page(write_report([run])).text
    for line in (
        "No metrics.jsonl yet: diptych pretrain CONFIG",
        f"Not evaluated yet: diptych evaluate {run}",
        "No example pictures:",
        "No fine-tuning run given: diptych finetune CONFIG",
        "The data of these runs is not on this machine:",
    ):
        assert line in text


def test_a_line_cut_by_a_crash_and_values_of_the_wrong_kind_do_not_stop_the_page(tmp_path: Path) -> None:
    pre = make_pretrain(tmp_path / "pre", steps=60)
    with (pre / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 60, "loss": NaN, "samples_seen": 30000}\n{"kind": "tr')
    (pre / "evaluate.json").write_text(
        json.dumps({"retrieval": {"pets": None}, "zero_shot": [], "examples": [3], "model": "x"})
    )
    page = Page(write_report([pre], tmp_path / "new" / "page.html"))
    assert "last loss nan" in page.text


def test_without_arguments_the_newest_run_of_each_kind_is_taken(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b", "c")):
        pre = make_pretrain(tmp_path / f"pre-{name}", steps=2)
        for file in (pre / "metrics.jsonl", pre / "config.yaml"):
            os.utime(file, (1000 + i % 2, 1000 + i % 2))
    make_finetune(tmp_path / "fine")
    assert newest_runs(tmp_path) == [tmp_path / "pre-b", tmp_path / "fine"]
    make_finetune(tmp_path / "held" / "holdout")  # a test at the end of no cross-validation
    for file in (tmp_path / "held" / "holdout").iterdir():
        os.utime(file, (3e9, 3e9))
    assert newest_runs(tmp_path) == [tmp_path / "pre-b", tmp_path / "held"]
    assert "held/holdout" in write_report([tmp_path / "held"]).read_text()
    with pytest.raises(UserError, match="no runs in"):
        newest_runs(tmp_path / "none")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        write_report([tmp_path / name])


def test_curves_are_well_formed_and_lie_inside_their_frame() -> None:
    wild = [float("nan"), 5.0, float("inf"), -3.0, *(float(i % 7) for i in range(2000))]
    chart = line_chart(
        "A & B",
        [Series("x<y", list(map(float, range(2004))), wild, marked=True)],
        x_name="steps",
        reference=2,
    )
    root = ET.fromstring(chart)
    line = root.find(".//polyline")
    assert line is not None
    points = [tuple(map(float, p.split(","))) for p in line.get("points", "").split()]
    assert 200 < len(points) <= 240
    assert all(0 <= x <= 460 and 0 <= y <= 230 for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert line_chart("empty", [Series("x", [1.0], [1.0])], x_name="steps") == ""
    flat = ET.fromstring(line_chart("flat", [Series("x", [1.0, 2.0], [0.5, 0.5])], x_name="steps"))
    assert flat.find(".//polyline") is not None


def test_interval_bars_say_in_words_what_they_draw() -> None:
    bar = ET.fromstring(interval_bar(0.63, 0.61, 0.65, reference=0.5))
    assert bar.get("aria-label") == "0.630, interval 0.610 to 0.650, reference 0.500"
    assert interval_bar(float("nan"), 0, 1) == ""


def test_ticks_are_round_and_cover_the_range() -> None:
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(0.0312, 0.187) == [0, 0.05, 0.1, 0.15, 0.2]
    assert nice_ticks(3, 3)[0] <= 3 <= nice_ticks(3, 3)[-1]
    assert [short_number(v) for v in (0, 12_400, 3e-5, 0.00075, 0.0312, 2.5e9)] == [
        "0",
        "12.4k",
        "3e-5",
        "7.5e-4",
        "0.0312",
        "2.5G",
    ]


@pytest.mark.parametrize(
    ("metric", "gain", "score"), [("macro_map", "+3.1", "61.2"), ("qwk", "+0.031", "0.612")]
)
def test_gains_and_folds_are_in_points_for_all_metrics_that_are_told_in_percent(
    metric: str, gain: str, score: str
) -> None:
    fusion = {"diff": 0.031, "low": 0.01, "high": 0.05, "metric": metric, "head": "late", "against": "text"}
    tile = "".join(gain_tile({"fusion_gain": fusion}))
    assert f"<b>{gain}</b>" in tile
    assert ("points of" in tile) == (metric == "macro_map")
    fold = {"metric": metric, "repeat": 0, "fold": 0, "scores": {"late": 0.612}, "gain": 0.031}
    section = fold_section({"folds": [fold], "heads": {"late": {}}, "spread": {}})
    assert f">{score}<" in section
    assert f">{gain}<" in section
    assert ("in percent" in section) == (metric == "macro_map")


def test_a_folder_that_holds_a_holdout_alone(tmp_path: Path) -> None:
    (tmp_path / "run" / "holdout").mkdir(parents=True)
    (tmp_path / "run" / "holdout" / "results.json").write_text("{}")
    path = write_report([tmp_path / "run"])
    assert path == tmp_path / "run" / "holdout" / "report.html"
    assert "run/holdout" in path.read_text()
