"""Both templates against a golden file each, and what is decided before they are filled."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bge_pruning.reports import report
from bge_pruning.reports.markdown import escape
from bge_pruning.reports.report_data import read_inputs
from bge_pruning.utils.visualization import DARK, LIGHT, make_figure

GOLDEN = Path(__file__).parent / "data"
SVG = '<svg width="432.5pt"><path d="M 1.23456 -0.98765"/><g transform="scale(0.015625)"/></svg>'
PICTURES = {name: report.Picture(None, SVG, "<svg>dark</svg>") for name in report.CAPTIONS}
NASTY = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a & b &lt; c", "a|b"]
NASTY += ["![x](http://a.b/c.png)", "[x](javascript:alert(1))", "{{ title }} {% %} %s", "模型"]


class Page(HTMLParser):
    """Tags with their attributes, and the text; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img", "source"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self):
        for image, source in zip(self.all("img"), self.all("source"), strict=True):
            uris = (image["src"], source["srcset"])
            yield [base64.b64decode(uri.partition(",")[2]).decode() for uri in uris]


@pytest.fixture
def drawn_quickly(monkeypatch):

    def draw(inputs):
        return {
            name: report.Picture(make_figure(1, 1), SVG, SVG)
            for name in report.find_pictures(inputs)
        }

    monkeypatch.setattr(report, "draw_pictures", draw)


def markdown(inputs, pictures=()):
    return report.render_report(
        inputs, {name: PICTURES[name] for name in pictures}, report.MARKDOWN
    )


def fill_the_disk(*_):
    raise OSError("No space left on device")


def headings(text):
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_templates_give_the_golden_texts(inputs):
    assert markdown(inputs, report.CAPTIONS) == (GOLDEN / "report.md").read_text(encoding="utf-8")
    page = report.render_report(inputs, PICTURES, report.HTML)
    body = re.sub(r"(?<=<style>\n).*?(?=</style>)", "", page, flags=re.DOTALL)
    assert body == (GOLDEN / "report.html").read_text(encoding="utf-8")


def test_the_page_says_what_the_markdown_says(inputs, make_pruning):
    inputs.pruning.constraint["layer"].expected_sparsity = 0.4  # with a warning
    html = Page(report.render_report(inputs, PICTURES, report.HTML))
    for line in markdown(inputs, report.CAPTIONS).splitlines():
        for cell in line.split("|"):
            words = re.sub(r"[*>#`]|\\(.)", r"\1", cell).strip()
            if words and not re.match(r"!\[|-+:?$|bash$|yaml$", words):
                assert words in html.text, line
    assert len(html.all("blockquote")) == 1


def test_the_page_needs_nothing_else_and_has_the_colours_of_its_pictures(inputs):
    html = Page(report.render_report(inputs, PICTURES, report.HTML))
    for tag, attributes in html.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name in {"src", "srcset", "href"} & set(attributes):
            assert attributes[name].startswith(("data:image/svg+xml;base64,", "#"))
    ids = [attributes["id"] for attributes in html.all("h2")]
    assert [attributes["href"] for attributes in html.all("a")] == [f"#{name}" for name in ids]
    style, _, paper = html.text.partition("@media print")
    light, _, dark = style.partition("@media screen and (prefers-color-scheme: dark)")
    assert f"--surface: {LIGHT.surface};" in light and f"--ink: {LIGHT.ink};" in light
    assert f"--surface: {DARK.surface};" in dark and f"--ink: {DARK.ink};" in dark
    assert "#" not in dark.partition("}")[2]  # every other rule goes by these names
    assert "url(" not in style and "@import" not in style and "nav" in paper
    # Pictures have words and a width, and are rounded where nobody sees it.
    assert {image["alt"] for image in html.all("img")} == set(report.CAPTIONS.values())
    assert {image["style"] for image in html.all("img")} == {"--width: 432.5pt"}
    for light, dark in html.pictures():
        assert light == SVG.replace("1.23456", "1.23").replace("0.98765", "0.99")
        assert dark == "<svg>dark</svg>"


@pytest.mark.parametrize("name", NASTY)
def test_names_commands_and_configurations_stay_text(name, inputs, make_record, make_entry):
    inputs.pruning.source.base_model = f"models\\{name}".replace("/", "")
    inputs.evaluation = make_record([make_entry(name, also={name: 0.5})])
    inputs.commands, inputs.config_text = [name], name
    html = Page(report.render_report(inputs, {}, report.HTML))
    text, base = markdown(inputs), inputs.pruning.source.base_model
    assert text.startswith(f"# Pruned {escape(base)}\n") and f"On {escape(name)} it sc" in text
    # Task and model in the sentence and in the table, and two blocks of code.
    assert html.text.count(name) >= 5
    assert not {tag for tag, _ in html.tags} & {"script", "img"}
    assert {a["href"][0] for a in html.all("a")} == {"#"}
    assert html.text.count(name.replace("/", "")) >= 2  # title and heading


@pytest.mark.parametrize(
    ("missing", "sections", "pictures"),
    [
        ("evaluation.json", {"Quality"}, {"summary.png", "scores.png"}),
        ("pruning.json", set(), set()),
        ("metrics.jsonl", {"Training"}, {"constraint.png", "multipliers.png", "training.png"}),
        ("metrics-recovery.jsonl", {"Recovery"}, {"recovery.png"}),
        ("config.yaml", {"Configuration"}, set()),
        ("commands.txt", set(), set()),
        ("gates.npz", set(), {"gates.png"}),
    ],
)
def test_a_missing_file_costs_its_sections_and_is_named(missing, sections, pictures, results):
    everything = headings(markdown(read_inputs(results)))
    (results / missing).unlink()
    inputs = read_inputs(results)
    found = report.find_pictures(inputs)
    assert set(report.CAPTIONS) - set(found) == pictures
    text = markdown(inputs, found)
    assert set(everything) - set(headings(text)) == sections
    assert text.endswith(f"Left out, because the folder does not hold them: {missing}.\n")
    assert f"not hold them: {missing}." in report.render_report(inputs, PICTURES, report.HTML)


def test_a_training_run(run_folder):
    inputs = read_inputs(run_folder)
    config = {"seed": 17, "model": {"base_model": "BAAI/bge-m3"}}
    inputs.config = inputs.config.model_validate(config)
    pictures = ["gates.png", "constraint.png", "multipliers.png", "training.png"]
    assert list(report.find_pictures(inputs)) == pictures
    text = markdown(inputs, pictures)
    start = "# Training run my-run\n\nAfter 39 steps of pruning from BAAI/bge-m3: "
    assert text.startswith(start)
    expected = ["What was pruned", "How the constraint was met", "Training", "How to reproduce"]
    assert headings(text) == [*expected, "Configuration"]
    assert "Seed of the run 17." in text
    assert "| version | of the run |" in text and "| torch | 2.7.0 |" in text
    # Without gates and before any step.
    for name in ("gates.npz", "config.yaml", "versions.json"):
        (run_folder / name).unlink()
    (run_folder / "metrics.jsonl").write_text("")
    inputs = read_inputs(run_folder)
    text = markdown(inputs)
    assert "After 0 steps of training without gates: what is known from training alone." in text
    assert headings(text) == ["How to reproduce"]
    inputs.commands = []
    assert Page(report.render_report(inputs, {}, report.HTML)).all("nav") == []


def test_how_scores_are_said_also_of_an_evaluation_alone(inputs, make_record, make_entry):
    other = make_entry("de", "sparse", value=0.41, retention=0.5, retention_above_floor=None)
    inputs.evaluation = make_record([make_entry(), other])
    text = markdown(inputs)
    assert "On de, sparse it scores 0.4100 against 0.8200: 50.0% is kept. It encodes" in text
    assert "| score kept, median of 2 | 74.4% |" in text
    many = [make_entry(f"t{n}", "all", retention=0.8 + n / 100) for n in range(9)]
    inputs.evaluation = make_record(many)
    summed = "Over 9 scores the median keeps 84.0% of the original's, the worst 80.0% (t0, all), "
    assert f"{summed}the best 88.0% (t8, all)." in markdown(inputs)
    alone = [make_entry(f"t{n}", baseline=None, retention=None) for n in range(9)]
    inputs.evaluation = make_record(alone)
    assert markdown(inputs).count("it scores") == 3
    inputs.evaluation = make_record([], parameters=None, speed=None, size_bytes=None)
    assert "Quality" not in headings(markdown(inputs))
    assert not {"summary.png", "scores.png"} & set(report.find_pictures(inputs))
    inputs.pruning = None
    alone = make_entry(baseline=None, retention=None, retention_above_floor=None)
    inputs.evaluation = make_record([alone], speed=None)
    inputs.evaluation.parameters.baseline = None
    text = markdown(inputs)
    assert text.startswith("# Evaluation of half\n")
    assert "On stsb-en-test it scores 0.8100 (floor 0.5100)." in text
    assert "at a glance" in text and "score kept" not in text


def test_every_picture_of_bge_m3_below_three_megabytes(results, make_evaluation, make_entry):
    rng = np.random.default_rng(0)
    shapes = {"head": (24, 16), "intermediate": (24, 4096), "layer": (24,), "hidden": (1024,)}
    gates = {axis: rng.uniform(size=shape) for axis, shape in shapes.items()}
    np.savez(results / "gates.npz", **gates, **{f"{a}_kept": g > 0.4 for a, g in gates.items()})
    modes = ("dense", "sparse", "colbert", "dense+sparse", "all")
    scores = [make_entry(f"task-{task}", mode) for task in range(6) for mode in modes]
    (results / "evaluation.json").write_text(json.dumps(make_evaluation(scores)))
    losses = ("alignment", "similarity", "sparse", "colbert")
    rows = [
        {"batch": n, "metrics": {f"loss/train/{name}": rng.exponential() for name in losses}}
        for n in range(15_000)
    ]
    for row in rows[::50]:
        for axis in (*shapes, "encoder"):
            for key in ("expected_sparsity", "target_sparsity", "realised_sparsity"):
                row["metrics"][f"pruning/{key}/{axis}"] = rng.uniform()
            for key in ("lambda_1", "lambda_2"):
                row["metrics"][f"pruning/{key}/{axis}"] = rng.normal()
    (results / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = names(results)
    assert report.write_report(results) == results / report.MARKDOWN
    assert names(results) - before == {report.MARKDOWN, report.HTML, *report.CAPTIONS}
    for name in report.CAPTIONS:
        assert (results / name).read_bytes().startswith(b"\x89PNG\r\n")
    assert 500_000 < (results / report.HTML).stat().st_size < 3_000_000
    page = Page((results / report.HTML).read_text(encoding="utf-8"))
    for light, dark in page.pictures():
        assert LIGHT.surface.lower() in light and DARK.surface.lower() in dark
        assert DARK.surface.lower() not in light
        assert light.count("<path") == dark.count("<path")


def test_files_are_the_same_twice_and_a_full_disk_leaves_them(results, drawn_quickly, monkeypatch):
    report.write_report(results)
    before = {name: (results / name).read_bytes() for name in (report.MARKDOWN, report.HTML)}
    report.write_report(results, overwrite=True)
    assert {name: (results / name).read_bytes() for name in before} == before
    with monkeypatch.context() as patch:
        patch.setattr("bge_pruning.utils.files.os.replace", fill_the_disk)
        with pytest.raises(OSError, match="No space left"):
            report.write_report(results, commands=["make all"], overwrite=True)
    assert {name: (results / name).read_bytes() for name in before} == before
    assert not [name for name in names(results) if name.startswith(".")]
    text = report.write_report(results, commands=["make all"], overwrite=True).read_text(
        encoding="utf-8"
    )
    assert "```bash\nmake all\n```" in text


@pytest.mark.parametrize("name", [report.MARKDOWN, report.HTML, "scores.png"])
def test_an_existing_report_is_kept(name, results, drawn_quickly):
    (results / name).write_text("mine")
    before = names(results)
    with pytest.raises(FileExistsError, match=rf"{re.escape(name)} exists.*--overwrite"):
        report.write_report(results)
    assert names(results) == before
    assert (results / name).read_text() == "mine"
    report.write_report(results, overwrite=True)
    assert (results / name).read_bytes() != b"mine"


def test_a_failed_report_leaves_the_folder_alone(results, make_evaluation, make_entry, monkeypatch):
    entry = make_entry()
    del entry["interval"]
    (results / "evaluation.json").write_text(json.dumps(make_evaluation([entry])))
    before = names(results)
    with monkeypatch.context() as patch:
        patch.setattr(report, "draw_pictures", lambda _: {})
        with pytest.raises(ValueError, match=r"half: the results have no 'interval'\. To fix, wri"):
            report.write_report(results)
    assert names(results) == before
    for name in ("evaluation.json", "metrics.jsonl", "metrics-recovery.jsonl"):
        (results / name).unlink()
    np.savez(results / "gates.npz", layer=np.array([0.5, 1.5]))
    before = names(results)
    with pytest.raises(ValueError, match=r"gates of layer are not in \[0, 1\]"):
        report.write_report(results)
    assert names(results) == before
