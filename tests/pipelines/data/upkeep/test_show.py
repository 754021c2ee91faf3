"""Clips beside what their codes show: which, how alike, and what is told of codes that no codebook has."""

import base64
import io
import re
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.data import command
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.upkeep.codes import snapshot_tokenizer
from pipelines.data.upkeep.show import choose_keys, show_clips
from pipelines.errors import UserError


def show(dataset, out, tokenizer, *arguments):
    return CliRunner().invoke(
        command, ["show", str(dataset), *arguments, "--out", str(out), "--tokenizer", str(tokenizer)]
    )


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def luma_difference(frames: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs((frames.astype(float) - other) @ [0.299, 0.587, 0.114]).mean())  # chroma is at half the size


@pytest.fixture(scope="module")
def page(curated, tokenizer_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("show") / "show.html"
    shown = show(curated[0], out, tokenizer_file, "good_001.mp4", "twin of 'good' 0.mp4")
    assert shown.exit_code == 0, shown.output
    return out.read_text(encoding="utf-8")


def test_the_page_holds_source_and_codes_of_the_named_clips_with_their_psnr(page, curated, tokenizer_file):
    snapshot = open_snapshot(str(curated[0]))
    loaded = snapshot_tokenizer(snapshot, str(tokenizer_file))
    videos = [frames_of(base64.b64decode(data)) for data in re.findall(r"data:video/mp4;base64,([^\"]+)", page)]
    keys = choose_keys(snapshot, ["good_000.mp4", "good_001.mp4"], 8)  # the copy's clips are the original's
    assert len(videos) == len(keys) == 2
    for clip, video in zip(show_clips(snapshot, keys, loaded), videos, strict=True):
        assert f"{clip.psnr:.1f} dB" in page
        assert f"this is {clip.row['path']}" in page
        width = clip.decoded.shape[2]
        left, right = video[:, :, :width], video[:, :, -width:]
        for half, own, other in ((left, clip.source, clip.decoded), (right, clip.decoded, clip.source)):
            assert 3 * luma_difference(half, own) < luma_difference(half, other)


def test_without_names_clips_of_many_sources_are_drawn(curated):
    snapshot = open_snapshot(str(curated[0]))
    keys = choose_keys(snapshot, [], 4)
    assert len({key.partition(":")[0] for key in keys}) == 4
    assert choose_keys(snapshot, [], 2) == keys[:2]


def test_what_has_no_codes_is_told_with_its_fate_and_leaves_no_file(curated, tokenizer_file, tmp_path):
    snapshot = open_snapshot(str(curated[0]))
    with pytest.raises(UserError, match=r"'static.mp4' was kept, and so none has codes \(rejected: motion_time"):
        choose_keys(snapshot, ["static.mp4"], 8)
    with pytest.raises(UserError, match=r"has no clip 'nothing\.mp4'"):
        choose_keys(snapshot, ["nothing.mp4"], 8)
    assert isinstance(show(curated[0], tmp_path / "show.html", tokenizer_file, "static.mp4").exception, UserError)
    assert isinstance(show(curated[0], tmp_path / "show.png", tokenizer_file).exception, UserError)
    assert list(tmp_path.iterdir()) == []


def test_codes_outside_the_codebook_and_sources_that_are_gone_are_told(curated, tokenizer_file, tmp_path):
    dataset = shutil.copytree(curated[0], tmp_path / "dataset")
    shutil.rmtree(dataset / "stages" / "sources")
    snapshot = open_snapshot(str(dataset))
    shard = next(shard for bucket in snapshot.manifest.buckets for shard in bucket.shards)
    table = pq.read_table(f"{snapshot.uri}/{shard.path}")
    codes = [[65535, *row[1:-1], 65000] for row in table["codes"].to_pylist()]
    place = table.schema.get_field_index("codes")
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(codes, pa.list_(pa.uint16()))),
        f"{snapshot.uri}/{shard.path}",
    )
    name = table["clip_id"][0].as_py()
    shown = show(dataset, tmp_path / "show.mp4", tokenizer_file, name)
    assert shown.exit_code == 1
    assert f"{name}: 2 of {len(codes[0])} codes are outside the codebook" in shown.output
    assert "no source, unknown source" in shown.output
    assert len(frames_of((tmp_path / "show.mp4").read_bytes())) == 17
