"""Contact sheets: which clips are shown, what of them, and what is told where there is nothing to show."""

import base64
import html
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.data import command
from pipelines.data.curate import curate
from pipelines.data.reasons import reason_classes
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.snapshot.schemas import LEDGER
from pipelines.data.upkeep import stills
from pipelines.data.upkeep.contact import CLIPS_EACH, choose_clips, contact_sheets, hash_strings
from pipelines.data.upkeep.report import write_report
from pipelines.decoding.errors import VideoError
from tests.pipelines.data.corpora import curate_config
from tests.pipelines.data.snapshots import make_snapshot
from tests.pipelines.data.videos import moving_square, still, write_video

MOVES = 12  # clips of a moving square
SIZE, SIDE, FRAMES = 160, 32, 18


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Clips of a square that moves 2 px a frame, some of them changed, and files without frames."""
    folder = tmp_path_factory.mktemp("films") / "videos"
    folder.mkdir()
    square = {"size": (SIZE, SIZE), "side": SIDE}
    for index in range(MOVES):
        write_video(folder / f"move_{index:02d}.mp4", moving_square(FRAMES, seed=index, **square))
    again = moving_square(FRAMES, seed=0, **square)
    write_video(folder / "again.mp4", again, options={"preset": "veryfast", "crf": "26", "threads": "1"})
    barred = np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)
    barred[:, 20:-20] = moving_square(FRAMES, size=(SIZE, SIZE - 40), side=SIDE, seed=50)
    write_video(folder / "barred.mp4", barred)
    write_video(folder / "static.mp4", still(FRAMES, size=(SIZE, SIZE)))
    (folder / "text & <b>.mp4").write_text("not a video " * 99)
    shutil.copy(folder / "move_01.mp4", folder / "twin.mp4")
    return folder


@pytest.fixture(scope="module")
def made(videos, tokenizer_file, tmp_path_factory, ray_cluster):
    dataset = tmp_path_factory.mktemp("made") / "dataset"
    options = ("captions.require=false", "near_duplicates=0.99", "moving_duplicates.motion=null")  # all move alike
    curate(curate_config(videos, dataset, tokenizer_file, *options))
    return dataset


@pytest.fixture
def films(videos, tmp_path):
    """A copy of the sources that a test may spoil."""
    return shutil.copytree(videos, tmp_path / "films")


@pytest.fixture
def dataset(made, videos, films, tmp_path):
    """A copy of the dataset, made from that copy of its sources as far as it knows."""
    return moved(shutil.copytree(made, tmp_path / "dataset"), str(videos), str(films))


def moved(dataset: Path, old: str, new: str) -> Path:
    for part in dataset.glob("stages/sources/*/part-*.parquet"):
        table = pq.read_table(part)
        keys = pa.array([key.replace(old, new, 1) for key in table["work_key"].to_pylist()], pa.string())
        pq.write_table(table.set_column(0, table.schema.field("work_key"), keys), part)
    return dataset


@dataclass
class Tile:
    path: str
    title: str
    images: list[np.ndarray]
    text: str
    fate: str
    pair: bool


def tiles(page: Path) -> list[Tile]:
    found = []
    text = page.read_text(encoding="utf-8").partition('<section class="contact">')[2]
    figure = re.compile(r'(<div class="pair">)?<figure class="card" title="([^"]*)">(.*?)</figure>', re.DOTALL)
    for section in text.split("<h3>")[1:]:
        fate = html.unescape(section.partition(" <i>")[0])
        for match in figure.finditer(section):
            inner = match[3]
            data = [base64.b64decode(each) for each in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', inner)]
            images = [cv2.imdecode(np.frombuffer(each, np.uint8), cv2.IMREAD_COLOR) for each in data]
            told = " ".join(html.unescape(re.sub("<[^>]+>", " ", inner)).split())
            title = html.unescape(match[2])
            found.append(Tile(title.partition("\n")[0], title, images, told, fate, match[1] == '<div class="pair">'))
    return found


def report(dataset: Path | str, tmp_path: Path, *options: str) -> list[Tile]:
    shown = CliRunner().invoke(command, ["report", str(dataset), "--out", str(tmp_path / "report.html"), *options])
    assert shown.exit_code == 0, shown.output
    return tiles(tmp_path / "report.html")


def of(found: list[Tile], path: str) -> Tile:
    return next(tile for tile in found if tile.path == path)


def square_left(image: np.ndarray) -> float:
    """Left edge of the bright square, px of the source."""
    bright = (image[..., 2] > 200).sum(axis=0) > 10  # red of BGR; the background stays below 120
    return float(np.flatnonzero(bright)[0]) * SIZE / image.shape[1]


def test_a_tile_shows_start_middle_and_end_of_the_clip(dataset, tmp_path):
    found = report(dataset, tmp_path)
    kept = [tile for tile in found if tile.fate == "kept"]
    assert len(kept) == CLIPS_EACH
    assert {len(tile.images) for tile in kept} == {3}
    for tile in kept:
        assert {image.shape[0] for image in tile.images} == {stills.FRAME_HEIGHT}
        assert "0.0 to 1.5 s" in tile.text
        lefts = [square_left(image) for image in tile.images]
        assert lefts == pytest.approx([0, FRAMES, 2 * (FRAMES - 1)], abs=2.1), tile.path


def test_below_the_frames_of_a_kept_clip_is_what_its_codes_show(made, videos, tokenizer_file, tmp_path):
    found = report(made, tmp_path, "--tokenizer", str(tokenizer_file))
    kept = [tile for tile in found if tile.fate.startswith("kept") and tile.path != "barred.mp4"]  # which is cropped
    assert len(kept) > CLIPS_EACH  # those drawn, and those around the threshold that rejects the still one
    for tile in kept:
        assert len(tile.images) == 6
        assert re.search(r"\d\.\d dB", tile.text)
        lefts = [square_left(image) for image in tile.images[:3]]
        assert lefts == pytest.approx([0, 16, 32], abs=2.1), tile.path  # of the frames that were encoded, 17
    near = next(tile for tile in found if tile.fate == "duplicate: near")
    assert re.search(r"near: of (move_00|again)\.mp4, 0\.0 to 1\.5 s \(cosine", near.text)


def test_the_pictures_shape_is_kept_and_its_bars_are_cut_off(dataset, tmp_path):
    found = report(dataset, tmp_path)
    for image in of(found, "static.mp4").images:
        assert image.shape == (120, 120, 3)
    ledger = open_snapshot(str(dataset)).read_ledger()
    [row] = [row for row in ledger.to_pylist() if row["path"] == "barred.mp4"]
    for data in stills.decode_frames(open_snapshot(str(dataset)), [row])[row["key"]]:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert abs(image.shape[1] - 160) <= 4
        assert image.max(axis=(1, 2))[[0, -1]].min() > 30


def test_tiles_tell_the_scores_and_the_whole_reason(dataset, tmp_path):
    tile = of(report(dataset, tmp_path), "static.mp4")
    assert tile.fate == "rejected: motion_time"
    assert tile.text.endswith("motion_time 0 < 0.25")
    assert tile.title == "static.mp4\nmotion_time 0 < 0.25"


def test_a_near_duplicate_is_shown_beside_its_original(dataset, tmp_path):
    found = report(dataset, tmp_path)
    index = next(i for i, tile in enumerate(found) if tile.fate == "duplicate: near")
    first, second = found[index : index + 2]
    assert first.pair
    assert {first.path, second.path} == {"again.mp4", "move_00.mp4"}
    assert "cosine" in first.text
    assert "the original, kept" in second.text
    for one, other in zip(first.images, second.images, strict=True):
        assert cv2.absdiff(one, other).mean() < 8


def test_files_without_frames_get_words(dataset, tmp_path):
    found = report(dataset, tmp_path)
    text = of(found, "text & <b>.mp4")
    assert text.fate == "failed: not_a_video"
    assert "no known container" in text.text
    twins = [tile for tile in found if tile.fate == "duplicate: exact"]
    assert [tile.images for tile in twins] == [[]]
    assert "the same content as" in twins[0].text


def test_a_source_that_is_gone_changed_or_damaged_gets_words_and_the_page_is_written(dataset, films, tmp_path):
    before = {tile.path for tile in report(dataset, tmp_path) if tile.fate == "kept"}
    gone, changed, damaged, touched = sorted(before - {"move_00.mp4", "move_01.mp4", "twin.mp4"})[:4]
    (films / gone).unlink()
    shutil.copy(films / "static.mp4", films / changed)
    times = (films / damaged).stat()
    (films / damaged).write_bytes(b"\0" * times.st_size)
    os.utime(films / damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.utime(films / touched)
    found = report(dataset, tmp_path)
    assert {tile.path for tile in found if tile.fate == "kept"} == before
    told = {gone: "missing file: no such file", changed: "changed file: holds another", damaged: "not a video: begins"}
    for path, words in told.items():
        assert of(found, path).images == []
        assert f"no frames, {words}" in of(found, path).text
    assert len(of(found, touched).images) == 3


def test_another_file_of_the_same_content_stands_in(dataset, films, tmp_path):
    ledger = open_snapshot(str(dataset)).read_ledger().to_pylist()
    [row] = [row for row in ledger if row["path"] in ("move_01.mp4", "twin.mp4") and row["end_s"]]
    (films / row["path"]).unlink()
    assert len(stills.decode_frames(open_snapshot(str(dataset)), [row])[row["key"]]) == 3


def test_one_snapshot_by_its_own_folder_finds_its_dataset(dataset, tmp_path, monkeypatch):
    [folder] = (dataset / "snapshots").iterdir()
    assert sum(len(tile.images) for tile in report(folder, tmp_path)) > 3 * CLIPS_EACH
    monkeypatch.chdir(folder)
    assert sum(len(tile.images) for tile in report(".", tmp_path)) > 3 * CLIPS_EACH
    alone = shutil.copytree(folder, tmp_path / "alone")
    found = report(alone, tmp_path)
    assert sum(len(tile.images) for tile in found) == 0
    assert "not in the stage tables" in of(found, "static.mp4").text


def test_without_frames_no_video_is_read(dataset, films, tmp_path):
    shutil.rmtree(films)
    assert report(dataset, tmp_path, "--no-frames") == []
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image" not in page
    assert 'href="#contact"' not in page


def test_the_page_is_the_same_again(dataset, tmp_path):
    pages = []
    for name in ("one.html", "two.html"):
        write_report(tmp_path / name, open_snapshot(str(dataset)))
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_few_sources_are_fetched_and_none_is_left_behind(dataset, films, tmp_path, monkeypatch):
    remote = fsspec.filesystem("memory")
    for path in films.iterdir():
        remote.pipe_file(f"/films/{path.name}", path.read_bytes())
    moved(dataset, str(films), "memory://films")
    monkeypatch.setattr(stills, "MAX_FETCHED", 5)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    remote.pipe_file("/films/static.mp4", b"something else")
    found = report(dataset, tmp_path)
    shown = {tile.path for tile in found if tile.images}
    assert len(shown) == 4  # and one was fetched in vain
    assert "changed file" in of(found, "static.mp4").text
    assert sum("no more than 5 files are fetched" in tile.text for tile in found) >= CLIPS_EACH - 5
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_store_out_of_reach_does_not_keep_the_page_from_being_written(dataset, films, tmp_path, caplog):
    moved(dataset, str(films), "nosuch://films")
    found = report(dataset, tmp_path)
    assert len(found) > CLIPS_EACH
    assert not any(tile.images for tile in found)
    assert caplog.text.count("nothing more is fetched") == 1


def ledger_of(rows: list[dict]) -> pa.Table:
    table = pa.Table.from_pylist(rows, schema=LEDGER)
    return table.append_column("class", reason_classes(table["reason"]))


def many(sources: int, each: int) -> list[dict]:
    kinds = [("kept", ""), ("rejected", "motion 0.1 < 0.2"), ("rejected", "fps 4 < 8; motion 0 < 0.2")]
    rows = []
    for index in range(sources * each):
        status, reason = kinds[index * 7 % 3]
        row = {"key": f"k{index:06d}", "path": f"p{index // each:03d}", "status": status, "reason": reason}
        rows.append(row | {"source_id": "s", "start_s": float(index), "end_s": index + 1.0})
    return rows


def test_clips_are_chosen_by_hash_and_spread_over_sources():
    rows = many(40, 30)
    sheets = choose_clips(ledger_of(rows))
    assert [(sheet.status, sheet.reason) for sheet in sheets] == [
        ("kept", ""),
        ("rejected", "fps"),
        ("rejected", "motion"),
    ]
    for sheet in sheets:
        assert sheet.total == 400
        assert len({row["path"] for row in sheet.rows}) == len(sheet.rows) == CLIPS_EACH
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert [sheet.rows for sheet in choose_clips(ledger_of(shuffled))] == [sheet.rows for sheet in sheets]
    assert {row["key"] for row in sheets[0].rows} != {row["key"] for row in rows if row["status"] == "kept"}


def test_few_sources_share_the_tiles_evenly():
    for sheet in choose_clips(ledger_of(many(5, 60))):
        assert sorted(Counter(row["path"] for row in sheet.rows).values()) == [2, 2, 2, 3, 3]
    assert [len(sheet.rows) for sheet in choose_clips(ledger_of(many(2, 6)))] == [4, 4, 4]
    assert choose_clips(ledger_of([])) == []


def test_the_hash_of_a_string_depends_on_it_alone():
    names = [f"Å{index}" * (index % 5) for index in range(1000)] + ["", "a", "b", "aa", "ab", "ba"]
    whole = hash_strings(pa.chunked_array([names]))
    pieces = pa.chunked_array([names[:7], [], names[7:500], names[500:]])
    assert np.array_equal(whole, hash_strings(pieces))
    assert np.array_equal(whole[3:40], hash_strings(pieces.slice(3, 37)))
    assert len(set(whole.tolist())) == len(set(names))
    assert 0.4 < np.mean(np.unique(whole) >> np.uint64(63)) < 0.6


def test_frames_are_asked_for_once_and_whoever_has_none_gets_words(tmp_path):
    clip, source = {"start_s": 0.0, "end_s": 2.0}, {"start_s": None, "end_s": None}
    rows = [
        clip | {"key": "s:0", "path": "a.mp4", "status": "kept", "reason": ""},
        clip | {"key": "t:0", "path": "b.mp4", "status": "duplicate", "reason": "near: of s:0 (cosine 0.998)"},
        clip | {"key": "u:0", "path": "c.mp4", "status": "rejected", "reason": "motion 0 < 0.2"},
        source | {"key": "s@d.mp4", "path": "d.mp4", "status": "duplicate", "reason": "exact: of s"},
        source | {"key": "v", "path": "e.txt", "status": "failed", "reason": "not_a_video (permanent): text"},
    ]
    rows = [row | {"source_id": row["key"][0]} for row in rows]
    asked = []

    def frames_of(snapshot, clips):
        asked.append([row["key"] for row in clips])
        return {"s:0": [b"first", b"last"], "t:0": [b"only"], "u:0": VideoError("missing_file", "no such file")}

    sheets = contact_sheets(make_snapshot(str(tmp_path), {"s:0": np.zeros((1, 4, 4), int)}), ledger_of(rows), frames_of)
    assert [sorted(keys) for keys in asked] == [["s:0", "t:0", "u:0"]]
    shown = {tile.row["path"]: tile for _, pairs in sheets for pair in pairs for tile in pair}
    assert shown["b.mp4"].frames == [b"only"]
    assert (shown["a.mp4"].frames, shown["a.mp4"].note) == ([b"first", b"last"], "the original, kept")
    assert shown["a.mp4"].caption == "the clip s:0"
    assert shown["c.mp4"].words == "no frames, missing file: no such file"
    assert shown["d.mp4"].words == "the same content as a.mp4"
    assert shown["e.txt"].words == "not_a_video (permanent): text"
    pairs = {pair[0].row["path"]: [tile.row["path"] for tile in pair] for _, pairs in sheets for pair in pairs}
    assert pairs["b.mp4"] == ["b.mp4", "a.mp4"]
