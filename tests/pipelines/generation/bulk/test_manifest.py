import json
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.generation.bulk.manifest import Manifest

ROW = {"path": "00000-a-0.mp4", "prompt": "a", "seed": 0, "config_hash": "abc"}


def test_what_was_added_is_held_after_a_restart(tmp_path: Path) -> None:
    manifest = Manifest(str(tmp_path / "out"))
    assert not manifest.holds(ROW)
    manifest.add(ROW, b"video")
    manifest.save()
    again = Manifest(str(tmp_path / "out"))
    assert again.holds(ROW)
    assert again.rows[ROW["path"]]["bytes"] == 5
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_prompts_may_hold_any_kind_of_line_end(tmp_path: Path) -> None:
    manifest = Manifest(str(tmp_path))
    rows = [{**ROW, "path": f"{n}.mp4", "prompt": f"a{end}b"} for n, end in enumerate("\u2028\u2029\x85\x1c\n")]
    for row in rows:
        manifest.add(row, b"video")
    manifest.save()
    again = Manifest(str(tmp_path))
    assert all(again.holds(row) for row in rows)


@pytest.mark.parametrize("change", [{"prompt": "b"}, {"seed": 1}, {"config_hash": "abd"}])
def test_a_video_made_otherwise_is_not_the_one_asked_for(tmp_path: Path, change: dict[str, object]) -> None:
    manifest = Manifest(str(tmp_path))
    manifest.add(ROW, b"video")
    assert not manifest.holds({**ROW, **change})


def test_a_file_that_is_gone_or_changed_is_not_held(tmp_path: Path) -> None:
    manifest = Manifest(str(tmp_path))
    manifest.add(ROW, b"video")
    (tmp_path / ROW["path"]).write_bytes(b"videp")
    assert not manifest.holds(ROW)
    (tmp_path / ROW["path"]).unlink()
    assert not manifest.holds(ROW)


def test_the_order_of_finishing_does_not_show(tmp_path: Path) -> None:
    rows = [{**ROW, "path": f"{i:05d}-a-0.mp4", "index": i} for i in range(12)]
    for name, order in (("there", rows), ("back", rows[::-1])):
        manifest = Manifest(str(tmp_path / name))
        for row in order:
            manifest.add(row, b"video")
        manifest.save()
    lines = (tmp_path / "there" / "manifest.jsonl").read_text()
    assert lines == (tmp_path / "back" / "manifest.jsonl").read_text()
    assert [json.loads(line)["index"] for line in lines.splitlines()] == list(range(12))


@pytest.mark.parametrize("content", [b"{", b"[1]\n", b'{"no": "path"}\n', b"\xff\xfe\n"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.jsonl is no manifest of videos"):
        Manifest(str(tmp_path))
