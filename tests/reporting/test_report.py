"""The page of `qi2 report`."""

import base64
import io
import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data_pipeline.samples.schema import Sample, Text
from qi2_jax.cli import main
from qi2_jax.pages import render
from qi2_jax.reporting import charts, curves, formats, panels, run_report
from qi2_jax.training.telemetry import accounting
from tests.caches import write_cache


class Page(HTMLParser):
    """Tags, texts and attributes of a page; checks that its tags close."""

    VOID = ("meta", "img", "br", "path", "circle")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.attributes = [], [], "", []
        self.feed(text)
        assert [tag for tag in self.open if tag not in ("html", "tr", "td", "th")] == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open)
            self.open.pop()

    def handle_data(self, data):
        self.text += data


def write_run(folder, steps=60, begun=1000.0, ended=True, hostile="ordinary"):
    folder.mkdir(parents=True)
    lines = [{"step": 0, "validation_loss": 2.0, "validation_loss/ema/256-0": 2.0, "validation_loss/raw/256-0": 2.1}]
    for step in range(1, steps + 1):
        times = {"time/seconds": 2.0, "time/steps": 0.75, "time/data": 0.25}
        norms = {f"gradient_norm/blocks_{k:02d}": 0.1 * k + 0.01 for k in range(12)}
        loss = None if step == 5 else 1 / step
        lines.append({"step": step, "loss": loss, "skipped_total": step // 50, **times, **norms, "new/thing": -step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "lo')
    events = [
        {"time": begun, "event": "start", "step": 0, "name": hostile, "commit": "abc123"},
        {"time": begun + 50, "event": "start", "step": 30},
        {"time": begun + 60, "event": "damaged_checkpoint", "step": 30, "message": hostile},
        {"time": begun + 70, "event": "save", "step": 40, "seconds": 1.5},
    ]
    events += [{"time": begun + 200, "event": "end", "step": steps}] * ended
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.json").write_text(json.dumps({"train": {"steps": 80}, "note": hostile}))
    (folder / "samples").mkdir()
    for step in (20, 40, 60):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "samples" / f"grid-{step}.png")


def test_page_shows_a_run_and_loads_nothing(tmp_path, capsys):
    write_run(tmp_path / "run")
    main.main(["report", str(tmp_path / "run"), "--json", str(tmp_path / "figures.json")])
    text = (tmp_path / "run" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    for tag, name, value in page.attributes:
        assert name != "src" or value.startswith("data:image/"), (tag, value)
        assert name != "href" or re.fullmatch(r"samples/grid-\d+\.png", value), value
    assert [value for _, name, value in page.attributes if name == "href"] == [
        f"samples/grid-{step}.png" for step in (20, 40, 60)
    ]
    assert page.tags.count("img") == 2 and page.text.index("step 60") < page.text.index("step 20")
    for said in ("loss", "validation_loss", "gradient_norm", "new", "256-0 ema", "finished", "60 of 80", "abc123"):
        assert said in page.text, said
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert figures["step"] == 60 and figures["steps"] == 80 and figures["restarts"] == 1
    assert figures["goodput"] == 60 * 2.0 * 0.75 / 200 and figures["wall_seconds"] == 200
    assert figures["last"]["loss"] == 1 / 60 and figures["lowest_validation_loss"] == 2.0
    assert figures["skipped_steps"] == 1 and figures["events"]["damaged_checkpoint"] == 1
    assert "run: step 60 of 80, finished" in capsys.readouterr().out


def test_runs_of_a_job_are_shown_in_the_order_of_their_starts(tmp_path):
    write_run(tmp_path / "job" / "b", begun=1000.0)
    write_run(tmp_path / "job" / "a" / "deeper", begun=5000.0, ended=False)
    write_run(tmp_path / "job" / "checkpoints" / "no_run")
    figures = run_report.write_report(tmp_path / "page.html", tmp_path / "job")
    assert [one["run"] for one in figures] == ["b", "a/deeper"]
    assert [one["state"] for one in figures] == ["finished", "running, or killed"]
    text = (tmp_path / "page.html").read_text()
    assert 'href="job/b/samples/grid-20.png"' in text and 'id="a/deeper"' in text
    contents = text.partition('<nav class="contents">')[2].partition("</nav>")[0]
    assert re.findall(r'<a href="#([^"]*)">', contents) == ["b", "a/deeper"]
    assert re.search(r"\.contents \{[^}]*flex-wrap: wrap", text)  # many links take several lines
    with pytest.raises(ValueError, match=r"no runs found in .*empty: neither it nor .* has a metrics\.jsonl"):
        (tmp_path / "empty").mkdir()
        run_report.write_report(tmp_path / "page.html", tmp_path / "empty")


def write_grid(folder, step, samples, whole=()):
    """A grid of a run with its JSON file and images at full size."""
    Image.new("RGB", (8, 8)).save(folder / f"edits-{step}.png")
    notes = {"columns": ["condition 1", "sample"], "samples": samples}
    (folder / f"edits-{step}.json").write_text(json.dumps(notes))
    (folder / f"edits-{step}.full").mkdir()
    for number in whole:
        Image.new("RGB", (9, 9)).save(folder / f"edits-{step}.full" / f"{number}.png")


def test_texts_of_a_grid_are_listed_with_links_to_full_sizes(tmp_path):
    write_run(tmp_path / "run")
    evil = "</li><script>alert('x')</script>"
    samples = [
        {"text": "把杯子变成蓝色"},
        {"text": None, "record": 17},
        {"text": evil, "record": evil},
        {"text": "\udc80"},
    ]
    write_grid(tmp_path / "run" / "samples", 60, samples, whole=(1, 3))
    write_grid(tmp_path / "run" / "samples", 20, "no list")
    run_report.write_report(tmp_path / "page.html", tmp_path / "run")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tags.count("ol") == 1 and page.tags.count("li") == 4 and "script" not in page.tags
    for said in ("step 60: condition 1, sample", "把杯子变成蓝色", "– record 17", f"{evil} record {evil}"):
        assert said in page.text, said
    links = [value for _, name, value in page.attributes if name == "href"]
    assert [link for link in links if ".full/" in link] == [f"run/samples/edits-60.full/{n}.png" for n in (1, 3)]


def test_tall_and_large_grids_are_shown(tmp_path):
    write_run(tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 256, (4300, 2600, 3), dtype=np.uint8)  # eight edits of three images
    Image.fromarray(noise).save(tmp_path / "run" / "samples" / "512-3-60.png", compress_level=1)
    run_report.write_report(tmp_path / "page.html", tmp_path / "run")
    text = (tmp_path / "page.html").read_text()
    Page(text)
    (shown,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == (1024, 1694)


def test_running_curriculum_has_a_table_of_stages(tmp_path):
    order = ["first", "second", "<third>"]  # not that of the alphabet
    record = {"order": order, "stages": {name: {} for name in sorted(order)}}
    text = np.zeros((1, 2), np.float32)
    sample = Sample(np.zeros((1, 1, 4), np.float32), (Text(text, (1,)),))
    for name in ("first", "second"):
        write_run(tmp_path / "stages" / name / "transformer", ended=name == "first")
    write_cache(tmp_path / "stages" / "first" / "samples", [(64, sample)] * 1200, Text(text, (1,)), {})
    (tmp_path / "curriculum.json").write_text(json.dumps(record))
    (tmp_path / "report.json").write_text(json.dumps({"stages": {"first": {"samples": 3}, "second": {"samples": 30}}}))
    second = tmp_path / "stages" / "second" / "transformer" / "metrics.jsonl"
    second.write_text(second.read_text().rpartition("\n")[0] + '\n{"step": 60, "validation_loss": 0.25}\n')
    run_report.write_report(tmp_path / "page.html", tmp_path)
    found = (tmp_path / "page.html").read_text()
    Page(found)
    rows = re.findall("<tr>(.*?)</tr>", found.partition("<h2>Stages</h2>")[2].partition("</table>")[0])
    cells = [re.findall("<td>(.*?)</td>", row) for row in rows[1:]]
    assert cells == [
        ['<a href="#stages/first/transformer">first</a>', "1,200", "60 of 80", "2.000 → 2.000", "3.3", "finished"],
        [
            '<a href="#stages/second/transformer">second</a>',
            "30",
            "60 of 80",
            "2.000 → 0.250",
            cells[1][4],
            cells[1][5],
        ],
        ["&lt;third&gt;", "–", "–", "–", "–", "not begun"],
    ]
    assert cells[1][5] == "running, or killed"
    run_report.write_report(tmp_path / "page.html", tmp_path / "stages")
    assert "<h2>Stages</h2>" not in (tmp_path / "page.html").read_text()


def test_run_with_metrics_only_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n')
    (figures,) = run_report.write_report(tmp_path / "page.html", tmp_path)
    assert figures["state"] == "unknown" and figures["goodput"] is None and figures["last"] == {"loss": 0.5}
    (tmp_path / "metrics.jsonl").write_text("")
    assert run_report.write_report(tmp_path / "page.html", tmp_path)[0]["step"] is None
    Page((tmp_path / "page.html").read_text())


def test_names_and_messages_from_outside_are_escaped(tmp_path):
    evil = "\"><script>alert('x')</script>&<img src=http://a>"
    write_run(tmp_path / "run", hostile=evil)
    (tmp_path / "run" / "samples" / "<b>evil-1.png").write_bytes(b"no image")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 70, evil: 1.0, "a/" + evil: 2.0, "text": evil}) + "\n")
    run_report.write_report(tmp_path / "page.html", tmp_path / "run")
    page = Page((tmp_path / "page.html").read_text())
    assert "script" not in page.tags and "b" not in [tag for tag, *_ in page.attributes]
    assert not any(value and "http:" in value for _, name, value in page.attributes if name in ("src", "href"))
    assert page.text.count(evil) >= 3 and page.text.count("alert('x')") >= 5 and "cannot be read" in page.text


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ({"event": "sigterm"}, "stopped by SIGTERM, can be resumed"),
        ({"event": "error", "message": "watchdog: no progress"}, "failed: watchdog: no progress"),
        ({"event": "restore"}, "running, or killed"),
    ],
)
def test_state_is_that_of_the_last_event_that_is_not_routine(tmp_path, last, state):
    write_run(tmp_path / "run", ended=False)
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 2000.0, **last}) + "\n" + json.dumps({"time": 2001.0, "event": "save"}) + "\n")
    assert run_report.write_report(tmp_path / "page.html", tmp_path / "run")[0]["state"] == state


def test_a_curve_keeps_ends_extremes_and_means_in_bounded_memory():
    rng, curve = np.random.default_rng(0), curves.Curve()
    values = rng.standard_normal(100_000)
    values[77_777], values[3], values[50_000] = 99.0, -99.0, np.nan
    for start in range(0, 100_000, 7_000):
        curve.add(np.arange(start, min(start + 7_000, 100_000)) * 10.0, values[start : start + 7_000])
    steps, means, low, high = curve.points
    assert curves.POINTS / 2 <= len(steps) <= 2 * curves.POINTS and np.all(np.diff(steps) > 0)
    assert high.max() == 99.0 and low.min() == -99.0 == curve.low and curve.count == 99_999
    assert (curve.first, curve.last, curve.span) == (values[0], values[-1], (0, 999_990))
    bucket = values[50_001:60_001]
    inside = (steps > 500_010) & (steps < 600_010)
    assert np.mean(means[inside]) == pytest.approx(bucket.mean(), abs=0.01)


def test_few_values_are_drawn_as_they_are():
    curve = curves.Curve()
    curve.add(np.array([1.0, 5.0]), np.array([2.0, np.inf]))
    curve.add(np.array([7.0]), np.array([3.0]))
    assert [part.tolist() for part in curve.points] == [[1, 7], [2, 3], [2, 3], [2, 3]] and curve.width == 1


def test_blocks_and_broken_lines_lose_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "BLOCK", 100)
    lines = [{"step": step, "loss": float(step)} for step in range(50)]
    texts = [json.dumps(line) for line in lines]
    texts[10:10] = ["nonsense", "[1]", '{"loss": 1}', '{"step": "x", "loss": 1}', '{"step": 9, "loss": "high"}', "null"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(texts) + '\n{"step": 50, "lo')
    found = curves.scan(tmp_path / "metrics.jsonl")
    assert found.curves["loss"].points[1].tolist() == list(range(50)) and found.step == 49


def test_kept_seconds_agree_with_goodput(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    assert curves.scan(path).kept_seconds == accounting.kept_seconds(accounting.metrics.lines(path)) == 90


def test_a_million_steps_are_a_small_page_in_seconds(tmp_path):
    body = ", ".join(f'"loss_t/{k:02d}": 0.{k}25' for k in range(9))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step}, "loss": 0.{step % 977 + 100}, {body}}}\n' for step in range(1, 960_001))
    begun = time.monotonic()
    (figures,) = run_report.write_report(tmp_path / "page.html", tmp_path)
    assert figures["step"] == 960_000 and time.monotonic() - begun < 60  # 2 s on a machine without other work
    assert (tmp_path / "page.html").stat().st_size < 1e6


def draw(lines, span):
    return render("chart.html", chart=charts.chart(lines, span))


def curve_of(*values):
    curve = curves.Curve()
    curve.add(np.arange(1.0, len(values) + 1), np.array(values, float))
    return curve


def test_metrics_share_charts_by_prefix_and_scale():
    names = {
        "loss": (1, 2),
        "gradient_norm": (1, 2),
        "gradient_norm/a": (1, 2),
        "gradient_norm/b": (1, 3),
        "validation_loss/ema/256-0": (1, 2),
        "validation_loss/raw/256-0": (1, 2),
        "batch/padding": (0, 0.5),
        "batch/side": (0, 512),
        "unknown": (1, 2),
    }
    found = panels.sections({name: curve_of(*values) for name, values in names.items()})
    shown = {section: [(p.title, [line.label for line in p.lines]) for p in some] for section, some in found.items()}
    assert shown == {
        "Loss": [("loss", ["loss"]), ("validation_loss/…", ["256-0 ema", "256-0 raw"])],
        "Optimisation": [("gradient_norm", ["gradient_norm"]), ("gradient_norm/…", ["a", "b"])],
        "Data": [("batch/…", ["padding"]), ("batch/…", ["side"])],
        "Other": [("unknown", ["unknown"])],
    }


@pytest.mark.parametrize("values", [(5,), (0, 0), (-3, -3), (1e-9, 1e9), (-1, 1), (1e30, 2e30), (0.1, 0.1 + 1e-12)])
def test_charts_of_any_range_have_ticks_inside(values):
    drawn = draw([charts.Line("x", curve_of(*values), "x")], (1, len(values)))
    places = [float(place) for place in re.findall(r'y="([\d.]+)" text-anchor="end"', drawn)]
    assert places and all(charts.TOP <= place <= charts.HEIGHT for place in places)
    assert "nan" not in drawn and "inf" not in drawn


def test_each_stream_has_one_chart_of_validation_loss_over_t():
    streams, places = ("256-0", "256-1"), [f"{place:02d}" for place in range(9)]
    names = [f"validation_loss/{kind}_t/{s}/{t}" for kind in ("ema", "raw") for s in streams for t in places]
    names += [f"validation_loss/ema_t/{t}" for t in places]
    (found,) = panels.sections({name: curve_of(1, 2) for name in names}).values()
    labels = [f"{t} {kind}" for t in places for kind in ("ema", "raw")]
    assert [(panel.title, [line.label for line in panel.lines]) for panel in found] == [
        ("validation_loss/ema_t/…", places),
        *((f"validation_loss/*_t/{stream}/…", labels) for stream in streams),
    ]
    assert "EMA solid" in found[1].note and found[0].note.startswith("EMA weights")


def test_axis_is_logarithmic_for_positive_values_that_spread_widely():
    for values, expected in (((1, 100), True), ((1, 2), False), ((0, 100), False), ((-1, 100), False)):
        drawn = draw([charts.Line("x", curve_of(*values), "x")], (1, 2))
        assert (">log<" in drawn) == expected, values


def test_numbers_are_short():
    numbers = (0.0, 1234.5, 12345, 1_234_567, 1.2e-5, -2.5e9, 3e13)
    assert [formats.number(value) for value in numbers] == ["0", "1234", "12.35K", "1.235M", "1.2e-05", "-2.5G", "30T"]
