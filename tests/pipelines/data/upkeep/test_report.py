"""The report's numbers, against counting row by row."""

import re
from collections import Counter
from dataclasses import asdict, replace
from html import unescape

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.reasons import reason_classes
from pipelines.data.scores import Thresholds
from pipelines.data.settings import PublishConfig
from pipelines.data.snapshot.schemas import LEDGER, SCORES
from pipelines.data.snapshot.write import write_snapshot
from pipelines.data.steps.decide import decide
from pipelines.data.upkeep.report import score_columns, what_if, write_report
from tests.pipelines.data.corpora import reason_class
from tests.pipelines.data.snapshots import snapshot_content

THRESHOLDS = Thresholds(min_motion=0.3, min_width=300)


def ledger_rows(count: int) -> list[dict]:
    """Clips of random scores, some of them null, and every tenth row a file that could not be read."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        row = {"key": f"{index:05d}", "path": f"v{index % 70:02d}.mp4", "source_id": "s"}
        if index % 10 == 9:
            rows.append(row | {"status": "failed", "reason": "not_a_video (permanent): a <b>"})
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
        first = next(row for row in rows if (row["status"], reason_class(row["reason"])) == (status, reason))
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
