"""The gallery in a real browser: opened, sorted, filtered, by keyboard, and at a phone's width."""

import json
import re
from pathlib import Path

import pytest

from pipelines.evaluation.evaluate import EvaluateConfig, Evaluation, RunScores, VideoScores, evaluate
from pipelines.evaluation.gallery import write_gallery
from pipelines.evaluation.metrics import METRICS
from pipelines.evaluation.videos import VideoFile, VideoFolder
from pipelines.media import encode_video
from tests.chromium import BlockingTab, blocking_chromium
from tests.pipelines.evaluation.folders import FPS, moving, write_generated, write_plain

PROMPTS = ["a red ball", 'two cats </script> & "more"', "عربي, right to left", "the sea"]
COUNT = 1000


@pytest.fixture(scope="module")
def browser():
    with blocking_chromium() as page:
        yield page


@pytest.fixture
def page(browser):
    browser.resize(1280, 900)
    browser.complaints.clear()
    browser.requested.clear()
    return browser


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two runs, the second with one prompt more and one that flickers."""
    root = tmp_path_factory.mktemp("videos")
    write_generated(root / "one", PROMPTS[:3])
    write_generated(root / "two", PROMPTS, noise=20.0)
    return evaluate(EvaluateConfig(folders=(str(root / "one"), str(root / "two"))))


def many(root: Path, count: int) -> Evaluation:
    """An evaluation of as many videos, which are a few files under many names."""
    files = []
    for index in range(8):
        (root / f"{index}.mp4").write_bytes(encode_video(moving(index, noise=8), FPS))
        files.append(str(root / f"{index}.mp4"))
    metrics = tuple(METRICS[name] for name in ("temporal_flickering", "motion", "sharpness"))
    scores = []
    for index in range(count):
        file = VideoFile(path=f"{index}.mp4", uri=files[index % 8], prompt=f"prompt {index} of many", seed=index % 5)
        values = {"temporal_flickering": 1 - (index * 7919 % count) / count, "motion": index / count, "sharpness": 9.0}
        scores.append(VideoScores(file=file, values=values, size=(13, 48, 48)))
    folder = VideoFolder(uri=str(root), label="many", videos=tuple(each.file for each in scores), note={})
    run = RunScores(folder=folder, videos=tuple(scores), figures={}, differences={})
    config = EvaluateConfig(folders=(str(root),), gallery="page")
    return Evaluation(config=config, metrics=metrics, runs=(run,), settings={})


def cards(page: BlockingTab) -> list[str]:
    return page.run("[...document.querySelectorAll('.one .prompt')].map(each => each.textContent)")


def scores(page: BlockingTab) -> list[str]:
    return page.run("[...document.querySelectorAll('.one b')].map(each => each.textContent)")


def choose(page: BlockingTab, name: str, value: str, event: str = "change") -> None:
    page.run(
        f"(() => {{ const node = document.getElementById('{name}'); node.value = {json.dumps(value)};"
        f"node.dispatchEvent(new Event('{event}')); }})()"
    )


def test_a_thousand_videos_open_at_once(page, tmp_path):
    path = write_gallery(str(tmp_path / "page"), many(tmp_path, COUNT)).page
    page.open(Path(path).as_uri())
    page.until("document.querySelector('.one video')?.readyState >= 2")
    # From the start of the navigation until everything has loaded; not held to a bound, as machines differ.
    took = page.run("performance.timing.loadEventEnd - performance.timing.navigationStart")
    print(f"{COUNT} videos, {Path(path).stat().st_size / 1e6:.1f} MB, opened in {took} ms")  # noqa: T201
    assert page.run("data.rows.length") == COUNT
    assert len(cards(page)) == 48
    assert page.run("[...document.querySelectorAll('video')].filter(each => each.src).length") < 48
    for _ in range(3):
        before = len(cards(page))
        page.run("document.getElementById('more').scrollIntoView()")
        page.until(f"document.querySelectorAll('.one').length > {before}")
    page.run("scrollTo(0, 0)")
    page.until("[...document.querySelectorAll('video')].filter(each => each.src).length < 48")
    assert not page.complaints
    assert all(url.startswith(("file:", "data:")) for url in page.requested)


def test_worst_first_and_filters(page, compared, tmp_path):
    page.open(Path(write_gallery(str(tmp_path), compared).page).as_uri())
    assert len(cards(page)) == 8
    names = page.run("data.metrics.map(each => each.words)")
    choose(page, "metric", str(names.index("temporal flickering")))
    values = page.run("order.map(row => value(row))")
    assert values == sorted(values)
    choose(page, "of", "1")
    second = page.run("order.map(row => row.cells[1].values[+at('metric').value])")
    assert second == sorted(second)
    choose(page, "of", "less1")
    gaps = [value for value in page.run("order.map(row => value(row))") if value is not None]
    assert len(gaps) == 6  # of prompts that both have; the others stand last
    assert gaps == sorted(gaps)
    assert page.run("order.slice(6).every(row => value(row) == null)")
    choose(page, "order", "given")
    assert cards(page)[0] == PROMPTS[0]
    choose(page, "text", "CATS more", "input")
    assert set(cards(page)) == {PROMPTS[1]}
    assert page.run("document.getElementById('count').textContent") == "2 of 8 shown"
    choose(page, "text", "nothing like it", "input")
    assert page.run("document.getElementById('more').textContent").startswith("Nothing fits")
    choose(page, "text", "", "input")
    choose(page, "of", "1")
    choose(page, "to", str(second[3]), "input")
    assert len(cards(page)) == 4
    assert not page.complaints


def test_by_keyboard(page, compared, tmp_path):
    page.open(Path(write_gallery(str(tmp_path), compared).page).as_uri())
    title = "document.getElementById('one-title').textContent"
    page.run("document.querySelector('.one').focus()")
    page.press("Enter")
    page.until("document.getElementById('one').open")
    assert page.run(title) == cards(page)[0]
    assert page.run("document.querySelectorAll('#one-scores tbody tr').length") == page.run("data.metrics.length")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run(title) == cards(page)[2]
    page.press("ArrowLeft")
    assert page.run(title) == cards(page)[1]
    page.press("Escape")
    page.until("!document.getElementById('one').open")
    page.until("[...document.querySelectorAll('.one')].indexOf(document.activeElement) === 1")
    assert not page.complaints


@pytest.mark.parametrize("form", ["page", "folder"])
def test_on_a_phone_and_in_both_forms(page, compared, tmp_path, form):
    config = EvaluateConfig(folders=compared.config.folders, gallery=form)
    evaluation = Evaluation(config=config, metrics=compared.metrics, runs=compared.runs, settings={})
    path = Path(write_gallery(str(tmp_path / "g"), evaluation).page)
    files = sorted(each.name for each in (tmp_path / "g").rglob("*.mp4"))
    assert len(files) == (14 if form == "folder" else 0)
    page.resize(390, 844)
    page.open(path.as_uri())
    page.run("document.getElementById('videos').scrollIntoView()")
    page.until("document.querySelector('.one video')?.readyState >= 2")
    assert page.run("document.documentElement.scrollWidth") <= 390
    page.run("document.querySelector('.one').click()")
    page.until("document.querySelector('#one-videos video')?.readyState >= 2")
    assert page.run("document.getElementById('one').getBoundingClientRect().width") <= 390
    assert not page.complaints


def test_auto_puts_videos_within_the_page_up_to_a_bound(tmp_path):
    write_plain(tmp_path / "v", ["a ball"])
    size = sum(each.stat().st_size for each in (tmp_path / "v").iterdir()) / 1e6
    for bound, embedded in ((size * 1.01, 2), (size * 0.99, 0)):
        config = EvaluateConfig(folders=(str(tmp_path / "v"),), page_mb=bound)
        gallery = write_gallery(str(tmp_path / "g"), evaluate(config))
        assert gallery.whole == bool(embedded)
        assert len(re.findall("data:video/mp4;base64", Path(gallery.page).read_text(encoding="utf-8"))) == embedded
    assert len(list((tmp_path / "g").rglob("*.mp4"))) == 2


def test_videos_of_one_prompt_and_number_are_all_shown(page, tmp_path):
    write_plain(tmp_path / "v" / "a", ["a ball"])
    write_plain(tmp_path / "v" / "b", ["a ball"])
    page.open(
        Path(write_gallery(str(tmp_path / "g"), evaluate(EvaluateConfig(folders=(str(tmp_path / "v"),)))).page).as_uri()
    )
    assert sorted(page.run("data.rows.map(row => row.cells[0].path)")) == [
        "a/a ball-0.mp4",
        "a/a ball-1.mp4",
        "b/a ball-0.mp4",
        "b/a ball-1.mp4",
    ]
    assert len(cards(page)) == 4
