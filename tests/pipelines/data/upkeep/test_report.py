"""The report's numbers, against counting row by row."""

import re
from collections import Counter
from dataclasses import asdict, replace
from html import unescape

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.keys import clip_key
from pipelines.data.reasons import reason_classes
from pipelines.data.scores import Thresholds
from pipelines.data.settings import PublishConfig
from pipelines.data.snapshot.schemas import LEDGER, SCORES
from pipelines.data.snapshot.write import write_snapshot
from pipelines.data.steps.decide import decide
from pipelines.data.steps.overrides import read_overrides
from pipelines.data.upkeep.borderline import find_borders
from pipelines.data.upkeep.changes import changed_settings, find_changes
from pipelines.data.upkeep.report import score_columns, what_if, write_report
from tests.chromium import blocking_chromium
from tests.pipelines.data.corpora import reason_class
from tests.pipelines.data.snapshots import snapshot_content

THRESHOLDS = Thresholds(min_motion=0.3, min_width=300)


def ledger_rows(count: int) -> list[dict]:
    """Clips of random scores, some of them null, and every tenth row a file that could not be read."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        source = f"{index % 70:064x}"
        row = {"key": clip_key(source, index, index + 2.5), "path": f"v{index % 70:02d}.mp4", "source_id": source}
        if index % 10 == 9:
            rows.append(row | {"key": f"{index:05d}@", "status": "failed", "reason": "not_a_video (permanent): a <b>"})
            continue
        scores = {name: float(generator.uniform(0, 1)) for name in SCORES}
        scores |= {"duration": float(generator.uniform(0, 10)), "width": 640.0, "height": 360.0, "fps": 24.0}
        scores = {name: None if generator.random() < 0.1 else value for name, value in scores.items()}
        status, reason = decide(scores, THRESHOLDS)
        rows.append(row | {"start_s": 1.0, "end_s": 3.5, "status": status, "reason": reason, "scores": scores})
    return rows


@pytest.fixture(scope="module")
def rows():
    return ledger_rows(900)


@pytest.fixture(scope="module")
def page(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    content = replace(
        snapshot_content({"a:0": np.zeros((1, 4, 4), int)}),
        ledger=pa.Table.from_pylist(rows, schema=LEDGER),
        created_from={"config": {"thresholds": asdict(THRESHOLDS)}, "stage_hashes": {}},
    )
    write_report(folder / "report.html", write_snapshot(str(folder), content, PublishConfig()), frames=False)
    return (folder / "report.html").read_text(encoding="utf-8")


def cells(page: str, heading: str) -> list[list[str]]:
    """A table's rows."""
    table = page.partition(f">{heading}</h2>")[2].partition("</table>")[0].partition("<tbody>")[2]
    lines = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[unescape(cell) for cell in re.findall(r"<t[dh][^>]*>([^<]*)", line)] for line in lines]


def test_counts_and_reasons_are_those_of_the_rows(page, rows):
    statuses = Counter(row["status"] for row in rows)
    for status in ("kept", "rejected", "failed", "duplicate"):
        assert f'<li class="card {status}"><b>{statuses[status]}</b> {status}</li>' in page
    expected = Counter((row["status"], reason_class(row["reason"])) for row in rows)
    found = cells(page, "What became of clips and sources")
    assert {(status, reason): int(count) for status, reason, count, *_ in found} == expected
    for status, reason, count, seconds, example in found:
        assert float(seconds) == pytest.approx(0 if status == "failed" else 2.5 * int(count), abs=0.51)
        own = [row for row in rows if (row["status"], reason_class(row["reason"])) == (status, reason)]
        first = min(own, key=lambda row: row["key"])
        assert example.startswith(first["path"])


def test_yields_of_sources_are_those_of_the_rows(page, rows):
    found = cells(page, "Yield by source")
    assert found.pop() == ["and 30 more"]
    assert len(found) == 40
    for path, clips, kept, seconds, reasons in found:
        own = [row for row in rows if row["path"] == path]
        assert int(clips) == len(own)
        assert int(kept) == sum(row["status"] == "kept" for row in own)
        assert seconds.endswith(f" of {sum(2.5 for row in own if 'end_s' in row):.0f}")
        expected = Counter(reason_class(row["reason"]) for row in own if row["status"] != "kept")
        assert all(expected[part.split()[1]] == int(part.split()[0]) for part in reasons.split(", "))


def test_other_thresholds_keep_what_deciding_row_by_row_keeps(rows):
    scores = [row["scores"] for row in rows if "scores" in row]
    found = what_if(score_columns(pa.Table.from_pylist(rows, schema=LEDGER)), THRESHOLDS)
    assert {item.name for item in found} == {name for name, value in asdict(THRESHOLDS).items() if value is not None}
    for item in found:
        assert item.passing == sum(decide(score, THRESHOLDS)[0] == "kept" for score in scores)
        for value, count in item.others:
            tried = replace(THRESHOLDS, **{item.name: value})
            assert count == sum(decide(score, tried)[0] == "kept" for score in scores), (item.name, value)


def test_around_each_threshold_stand_the_nearest_clips_of_both_sides(rows):
    ledger = pa.Table.from_pylist([row for row in rows if "scores" in row], schema=LEDGER)
    scored = ledger.to_pylist()
    found = {border.name: border for border in find_borders(ledger, score_columns(ledger), THRESHOLDS)}
    beyond = {}
    for row in scored:
        for part in filter(None, row["reason"].split("; ")):
            score, _, sign, _ = part.split()
            beyond.setdefault(("max_" if sign == ">" else "min_") + score, []).append(row)
    assert {name: border.total for name, border in found.items()} == {name: len(own) for name, own in beyond.items()}
    for name, border in found.items():

        def distance(row, score=border.score, value=border.value):
            return abs(row["scores"][score] - value)

        alone = [row for row in beyond[name] if "; " not in row["reason"]]
        nearest = [*sorted(alone, key=distance), *sorted((r for r in beyond[name] if r not in alone), key=distance)]
        assert border.outside == [row["key"] for row in nearest[:6]]
        kept = [row for row in scored if row["status"] == "kept" and row["scores"][border.score] is not None]
        kept = [row for row in kept if not (SCORES[border.score].of_time and row["scores"]["image"])]
        assert border.inside == [row["key"] for row in sorted(kept, key=distance)[:6]]


def test_what_is_ticked_is_the_table_that_overrides_reads(page, rows, tmp_path):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    listing = pa.table({"path": sorted({row["path"] for row in rows})})
    with blocking_chromium() as tab:
        tab.open(f"file://{tmp_path}/report.html")
        tab.run("document.getElementById('text').value = 'v07'; document.getElementById('status').value = '1'")
        tab.run("document.getElementById('text').dispatchEvent(new Event('input'))")
        rejected = [row for row in rows if row["path"] == "v07.mp4" and row["status"] == "rejected"]
        assert tab.run("document.getElementById('count').textContent") == f"1 to {len(rejected)} of {len(rejected)}"
        tab.run("document.querySelectorAll('#rows .keep')[0].click()")
        tab.run("document.querySelectorAll('#rows .reject')[1].click()")
        note = "document.querySelector('#rows .decide input')"
        tab.run(f"""{note}.value = 'fine, "as it is"'; {note}.dispatchEvent(new Event("input"))""")
        tab.run("window.made = null; URL.createObjectURL = blob => { window.made = blob; return '#'; }")
        tab.run("HTMLAnchorElement.prototype.click = () => {}")
        tab.run("document.getElementById('download').click()")
        (tmp_path / "overrides.csv").write_text(tab.run("window.made.text()"), encoding="utf-8", newline="")
        assert tab.complaints == []
    found = read_overrides(str(tmp_path / "overrides.csv"), listing)
    first, second = (row["key"] for row in rejected[:2])
    assert {key: (each.keep, each.note) for key, each in found.items()} == {
        first: (True, 'fine, "as it is"'),
        second: (False, ""),
    }


def test_a_name_without_end_does_not_widen_the_page(rows, tmp_path):
    long = {"path": "folder/" + "no_space" * 40 + ".mp4", "reason": "near: of " + rows[0]["key"] + " (cosine 0.995)"}
    changed = [row | (long if row["status"] != "kept" else {"path": long["path"]}) for row in rows[:60]]
    content = replace(
        snapshot_content({"a:0": np.zeros((1, 4, 4), int)}),
        ledger=pa.Table.from_pylist(changed, schema=LEDGER),
        created_from={"config": {"thresholds": asdict(THRESHOLDS)}, "stage_hashes": {}},
    )
    write_report(tmp_path / "report.html", write_snapshot(str(tmp_path / "d"), content, PublishConfig()), frames=False)
    with blocking_chromium() as tab:
        for width in (390, 1280):
            tab.resize(width, 900)
            tab.open(f"file://{tmp_path}/report.html")
            assert tab.run("document.documentElement.scrollWidth") <= width
            widest = (
                "Math.max(...[...document.querySelectorAll('td, th')].map(cell => cell.getBoundingClientRect().width))"
            )
            assert tab.run(widest) < 800


def test_two_ledgers_differ_by_what_came_and_went_and_why(rows):
    before = pa.Table.from_pylist(rows[:800], schema=LEDGER)
    stricter = replace(THRESHOLDS, min_motion=0.6, min_width=None)
    changed = []
    for row in rows[50:]:
        status, reason = decide(row["scores"], stricter) if "scores" in row else (row["status"], row["reason"])
        changed.append(row | {"status": status, "reason": reason})
    after = pa.Table.from_pylist(changed, schema=LEDGER)
    old, new = ({row["key"]: row for row in ledger.to_pylist()} for ledger in (before, after))
    for came, here, there in ((True, new, old), (False, old, new)):
        expected = Counter()
        for key, row in here.items():
            other = there.get(key)
            if row["status"] == "kept" and (other is None or other["status"] != "kept"):
                told = f"{other['status']}: {reason_class(other['reason'])}" if other else "not there"
                expected[told] += 1
        found = find_changes(before, after, came=came)
        assert {change.why: change.clips for change in found} == expected
        assert expected
        assert all(row["key"] in here for change in found for row in change.sheet.rows)
    assert changed_settings({"a": {"b": 1, "c": [2]}}, {"a": {"b": 3, "c": [2]}, "d": 4}) == [
        ("a.b", 1, 3),
        ("d", None, 4),
    ]


def test_no_threshold_beyond_one_is_tried_for_a_share():
    scores = score_columns(pa.Table.from_pylist([], schema=LEDGER))
    tried = {item.name: [value for value, _ in item.others[:-1]] for item in what_if(scores, Thresholds())}
    assert max(tried["min_decoded_share"]) <= 1
    assert max(tried["max_brightness"]) <= 1
    assert max(tried["max_dark_share"]) == 0.75
    assert max(tried["max_aspect"]) == 4.5


def test_every_score_has_its_histogram_though_some_are_null(page):
    named = re.findall(r"<figcaption><b>(\w+)</b>", page)
    assert set(named) == set(SCORES) - {"height"}  # the one that is the same everywhere, and has no threshold
    assert len(re.findall(r'<svg [^>]*role="img" aria-label="Histogram of', page)) == len(named)
    assert "<b>motion</b> threshold 0.3<" in page
    assert "nan" not in page


def test_reasons_are_classed_by_their_first_word():
    reasons = [
        "",
        "motion 0.1 < 0.2; fps 4 < 8",
        "near: of k (cosine 1)",
        "caption: none",
        "odd:: x",
        "a\nb c\nd",
        "é: x",
    ]
    assert reason_classes(pa.chunked_array([reasons])).to_pylist() == [
        reason.partition(" ")[0].rstrip(":") for reason in reasons
    ]
