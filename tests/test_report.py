"""The report of a run and the comparison: strict JSON, one page that asks for nothing, nothing unescaped."""

import json
import math
import subprocess
import sys
import warnings
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest

from ronna import plots
from ronna.base.errors import RonnaError
from ronna.report import (
    Section,
    build_report,
    problems,
    read_curves,
    read_run,
    write_comparison,
    write_report,
)
from ronna.tasks.metrics import classification_scores, perplexity_scores

EVIL = "<script>alert(1)</script>\r\n\x1b[31m\"'&"


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Page(HTMLParser):
    """Tags, image sources and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.images, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def read(path):
    html = path.read_bytes().decode("utf-8")
    page = Page(html)
    assert "script" not in page.tags and "\x1b" not in html and "\r" not in html
    assert all(image.startswith("data:image/svg+xml;base64,") for image in page.images)
    for drawing in page.images:
        svg = b64decode(drawing.partition(",")[2]).decode()
        assert "</svg>" in svg and "<script" not in svg
    return page


def fields(**changes):
    return {
        "title": "a run",
        "task": "classify",
        "config_hash": "0123abcd",
        "train": {"steps": 40, "tokens": 5000, "seconds": 65.0, "tokens_per_second": 76.9, "packing": 0.9},
        "memory": {"peak_bytes": 3 * 2**30, "planned_bytes": 4 * 2**30},
        "data": {"rows_in": 103, "kept": 100, "quarantined": 3, "cut": 7},
    } | changes


def scores(labels=("neg", "pos", "neutral"), rows=90):
    gold = np.arange(rows) % len(labels)
    return classification_scores(gold, np.where(np.arange(rows) % 7 == 0, 0, gold), labels)


def write_metrics(folder):
    lines = [{"step": s, "kind": "train", "loss": 3 / s, "lr": 1e-4} for s in range(1, 41) if not 10 < s < 20]
    lines += [{"step": s, "kind": "validation", "loss": 4 / s, "accuracy": 0.5} for s in (20, 40)]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 41, "ki')


def test_report_json_has_what_is_promised(tmp_path):
    write_report(tmp_path, build_report(test=scores(), **fields()))
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["test"]["accuracy"].keys() == {"value", "low", "high"}
    assert report["train"].keys() == {"steps", "tokens", "seconds", "tokens_per_second", "packing", "devices", "mfu"}
    assert report["memory"].keys() == {"peak_bytes", "planned_bytes", "held"}
    assert report["data"].keys() == {"rows_in", "kept", "quarantined", "cut", "windowed", "dropped"}
    assert report["task"] == "classify" and report["config_hash"] == "0123abcd"
    assert {"python", "torch", "ronna"} <= report["versions"].keys()
    assert len(report["details"]["confusion"]) == 3


def test_page_shows_every_part(tmp_path):
    write_metrics(tmp_path)
    (tmp_path / "run.toml").write_text('verb = "finetune"\n')
    page = read(write_report(tmp_path, build_report(test=scores(), validation=scores(rows=30), **fields())))
    words = "a run|test accuracy|95% interval|By class|weighted avg|Commonest errors|quarantined|cut, of those kept"
    for word in [
        *words.split("|"),
        "3.00 GiB",
        "4.00 GiB",
        'verb = "finetune"',
        "torch",
        "0123abcd",
        "1 min 5 s",
    ]:
        assert word in page.text, word
    assert len(page.images) == 3  # confusion, loss, learning rate


def test_text_of_others_is_escaped_everywhere(tmp_path):
    (tmp_path / "run.toml").write_text(EVIL, newline="")
    changes = {"title": EVIL, "verdict": EVIL, "extra": {EVIL: EVIL}, "config_hash": EVIL}
    page = read(write_report(tmp_path, build_report(test=scores((EVIL, "b", "$x_{$")), **fields(**changes))))
    assert page.text.count("<script>alert(1)</script>") >= 5
    assert "␛[31m" in page.text
    run = {"name": EVIL, "metrics": {EVIL: 1.0}}
    sample = {"input": EVIL, "output": EVIL, "gold": EVIL, "run": EVIL}
    section = {"title": EVIL, "text": EVIL, "runs": [run], "samples": [sample]}
    assert read(write_comparison(tmp_path, EVIL, [section])).text.count("<script>") >= 9


def trial(number, state="complete", value=0.5, **more):
    settings = {"lr": 10.0**-number, "epochs": number, "batch": 16}
    ended = {"monitor": "accuracy", "value": value, "seconds": 1.5} if state != "failed" else {"error": EVIL}
    return {"number": number, "run": "1", "state": state, "settings": settings, **ended, **more}


def test_a_search_is_shown_as_a_table_and_a_drawing(tmp_path):
    trials = [trial(1), trial(2, value=0.8125), trial(3, "stopped", 0.25), trial(4, "failed")]
    changes = {"search": {"monitor": "accuracy", "best": 2, "trials": trials}}
    page = read(write_report(tmp_path, build_report(test=scores(), **fields(**changes))))
    for word in ("Search", "4 trials", "0.01", "0.8125", "stopped", "<script>alert(1)</script>"):
        assert word in page.text, word
    assert len(page.images) == 2  # confusion, search
    found = json.loads((tmp_path / "report.json").read_text())["search"]
    assert found["trials"][1]["settings"] == {"lr": 0.01, "epochs": 2, "batch": 16} and found["best"] == 2
    html = (tmp_path / "report.html").read_text()
    assert html.count('<tr class="best">') == 1 and '<tr class="best"><th scope="row">2</th>' in html


def test_numbers_that_are_not_json_become_null(tmp_path):
    changes = {"test": {"loss": math.nan, "accuracy": np.float32(0.5)}, "note": "\ud800", "more": [math.inf]}
    write_report(tmp_path, fields(**changes))
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["test"]["loss"]["value"] is None and report["test"]["accuracy"]["value"] == 0.5
    assert report["more"] == [None] and report["note"] == "?"


def test_what_a_task_adds_is_in_the_json_and_short_things_on_the_page(tmp_path):
    more = {"parameters": 4_200_000, "dropped": {"too short": 2}, "evaluations": [{"step": 5}], "tied": True}
    page = read(write_report(tmp_path, fields(**more)))
    for word in ("4,200,000", '{"too short": 2}', "True"):
        assert word in page.text, word
    assert "evaluations" not in page.text
    assert json.loads((tmp_path / "report.json").read_text())["evaluations"] == [{"step": 5}]


def test_a_page_without_training_or_classes(tmp_path):
    report = build_report(
        title="perplexity", objective="clm", config_hash="1", validation=perplexity_scores(100.0, 50, 200)
    )
    page = read(write_report(tmp_path, report))
    assert "validation loss 2.0000" in report.verdict
    assert "perplexity" in page.text and "By class" not in page.text and not page.images


def test_problems_are_said():
    assert not list(problems(build_report(**fields())))
    lost = build_report(**fields(data={"rows_in": 10, "kept": 8, "quarantined": 1}))
    assert "rows do not add up: 10 in, 8 kept, 1 quarantined" in list(problems(lost))
    over = build_report(**fields(memory={"peak_bytes": 110, "planned_bytes": 100}))
    assert list(problems(over)) == ["memory went 10.0% over the plan"]


def test_curves_forgive_gaps_torn_lines_and_steps_written_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_curves(path).train == []
    lines = [
        '{"step": 2, "kind": "train", "loss": 5.0, "lr_scale": 0.5}',
        '{"step": 1, "kind": "train", "loss": "nan", "lr_scale": 1.0}',
        '{"step": 2, "kind": "train", "loss": 4.0}',
        '{"step": 3, "kind": "train"}',
        '{"step": "x", "kind": "train", "loss": 1.0}',
        '{"step": 3, "kind": "validation", "loss": 4.5}',
        "not json",
        '{"step": 4, "kind": "tr',
    ]
    path.write_text("\n".join(lines))
    curves = read_curves(path)
    assert [step for step, _ in curves.train] == [1, 2] and math.isnan(curves.train[0][1])
    assert curves.train[1] == (2, 4.0) and curves.validation == [(3, 4.5)]
    assert curves.rate == [(1, 1.0), (2, 0.5)] and curves.relative


def test_comparison_overlays_runs_and_shows_samples(tmp_path):
    for name in ("full", "lora"):
        write_metrics(tmp_path / name)
        write_report(tmp_path / name, build_report(test=scores(), **fields()))
    runs = tuple(read_run(tmp_path / name) for name in ("full", "lora"))
    sample = {"input": "退款多久到账?", "output": "三天", "gold": "3 天", "run": "lora"}
    sections = [Section(title="classify", runs=runs, samples=(sample,)), {"title": "empty"}]
    page = read(write_comparison(tmp_path, "demo", sections))
    for word in ("full", "lora", "macro_f1", "退款多久到账?", "三天", "1 min 5 s", "3.00 GiB"):
        assert word in page.text, word
    assert len(page.images) == 2
    assert json.loads((tmp_path / "comparison.json").read_text())["sections"][0]["runs"][1]["name"] == "lora"


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(RonnaError, match="no report here"):
        read_run(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(RonnaError, match="not a report"):
        read_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RonnaError, match="cannot write"):
        write_report(tmp_path / "file" / "run", build_report(**fields()))
    assert not list(tmp_path.glob("**/*.tmp"))


def test_labels_without_a_glyph_are_numbered_with_a_legend(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FONTS", ("DejaVu Sans",))
    assert plots.confusion_plot([[1, 0], [0, 1]], ["pos", "neg"])[1]
    assert not plots.confusion_plot([[1, 0], [0, 1]], ["正面", "负面"])[1]
    report = build_report(test=scores(("正面", "负面", "中性")), **fields())
    assert read(write_report(tmp_path, report)).text.count("正面") >= 3  # class, error, legend


def test_eighty_classes_are_drawn_and_a_thousand_are_listed(tmp_path):
    svg, named = plots.confusion_plot(np.eye(80, dtype=int).tolist(), [f"_label {i} $x_{{$" for i in range(80)])
    assert named and "</svg>" in svg
    many = build_report(test=scores([f"c{i}" for i in range(200)], rows=400), **fields())
    page = read(write_report(tmp_path, many))
    assert not page.images and "Commonest errors" in page.text


def test_a_mean_does_not_lag_and_a_gap_stays_a_gap():
    line = np.linspace(10, 0, 500)
    assert plots._smooth(line)[:480] == pytest.approx(line[:480])
    line[100:110] = np.nan
    assert np.isnan(plots._smooth(line)[100:110]).all() and np.isfinite(plots._smooth(line)[110:]).all()


def test_the_same_report_is_the_same_page(tmp_path):
    write_metrics(tmp_path)
    report = build_report(test=scores(), **fields())
    first = write_report(tmp_path, report).read_bytes()
    assert write_report(tmp_path, report).read_bytes() == first


def test_import_brings_neither_torch_nor_matplotlib():
    code = "import sys, ronna.report; sys.exit(len({'torch', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("mfu", "said"), [(0.425, "38 tokens/s at 42.5% of its matrix rate"), (None, "38 tokens/s;")])
def test_what_each_of_several_devices_did(mfu, said):
    train = fields()["train"]
    several = build_report(**fields(train=train | {"devices": 2, "mfu": mfu}))
    assert f"each of 2 devices {said}" in several.verdict
    assert "devices" not in build_report(**fields(train=train | {"mfu": mfu})).verdict
