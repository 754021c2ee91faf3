"""Clips captioned by an endpoint, through the whole curation."""

import shutil

import cv2
import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.captions.captioner import CAPTIONED, CaptionSource
from pipelines.data.captions.choose import Caption, caption_fault, unique_captions
from pipelines.data.config import CurateConfig
from pipelines.data.curate import curate
from pipelines.data.settings import CaptionConfig, SourceConfig
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.upkeep.status import retry
from pipelines.errors import JobError, UserError
from tests.pipelines.data.corpora import curate_config
from tests.pipelines.data.videos import write_video
from tests.pipelines.data.vision_server import MODEL, VisionServer, caption_of, card, fault_plan

CLIPS = 24


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Videos that each show a number."""
    folder = tmp_path_factory.mktemp("cards")
    for number in range(CLIPS):
        picture = cv2.imdecode(np.frombuffer(card(1000 + 37 * number), np.uint8), cv2.IMREAD_COLOR)
        write_video(folder / f"{number:02d}.mp4", np.repeat(picture[None], 18, axis=0))
    return folder


def endpoint_config(folder, dataset, tokenizer, url, *overrides):
    options = [
        "thresholds.min_motion_time=null",
        "captions.captioners=[endpoint]",
        f"captions.endpoint.url={url}",
        f"captions.endpoint.model={MODEL}",
        "captions.endpoint.max_side=64",
        "captions.endpoint.input_price=1000",
        "captions.endpoint.output_price=2000",
        "captions.endpoint.requests_per_minute=6000",
    ]
    return curate_config(folder, dataset, tokenizer, *options, *overrides)


def captions_by_path(dataset):
    snapshot = open_snapshot(str(dataset))
    paths = {row["key"]: row["path"] for row in snapshot.read_ledger().to_pylist() if row["status"] == "kept"}
    shards = [shard for bucket in snapshot.manifest.buckets for shard in bucket.shards]
    rows = [row for shard in shards for row in snapshot.read_shard(shard).to_pylist()]
    return {paths[row["clip_id"]]: [caption["text"] for caption in row["captions"]] for row in rows}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_caption_identity_through_the_whole_curation(cards, tokenizer_file, tmp_path):
    numbers = {f"{index:02d}.mp4": 1000 + 37 * index for index in range(CLIPS)}
    with VisionServer(faults=fault_plan(numbers.values(), seed=3, most=2)) as server:
        server.always[1000] = "400"  # the endpoint will not have this one
        result = curate(endpoint_config(cards, tmp_path / "d", tokenizer_file, server.url))
        asked = len(server.seen)
        found = captions_by_path(tmp_path / "d")
        assert found.keys() == numbers.keys() - {"00.mp4"}
        assert all(found[path] == [caption_of(number)] for path, number in numbers.items() if path != "00.mp4")
        assert asked > CLIPS  # some were asked again
        assert result.reasons == {"failed: caption_refused": 1}
        assert server.billed > CLIPS - 1  # answers that were no caption of the clip cost as much
        assert result.caption_cost == pytest.approx(server.billed * (100 * 1000 + 10 * 2000) / 1e6)
        # Another run asks for nothing; after a retry of that class only the refused one.
        assert sum(curate(endpoint_config(cards, tmp_path / "d", tokenizer_file, server.url)).computed.values()) == 0
        assert len(server.seen) == asked
        server.always.clear()
        assert retry(str(tmp_path / "d"), "caption_refused") == {"captions-endpoint": 1}
        curate(endpoint_config(cards, tmp_path / "d", tokenizer_file, server.url))
        assert len(server.seen) == asked + 1
        assert captions_by_path(tmp_path / "d")["00.mp4"] == [caption_of(1000)]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_endpoint_that_goes_down_leaves_what_is_done_and_the_run_continues(cards, tokenizer_file, tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    for number in range(6):
        shutil.copy(cards / f"{number:02d}.mp4", some)
    impatient = ["captions.endpoint.patience_seconds=1.5", "captions.endpoint.timeout_seconds=2"]
    with VisionServer() as server:
        server.always[None] = "500"
        with pytest.raises(JobError, match=r"stage captions-endpoint stopped: .*500"):
            curate(endpoint_config(some, tmp_path / "d", tokenizer_file, server.url, *impatient))
        server.always.clear()
        result = curate(endpoint_config(some, tmp_path / "d", tokenizer_file, server.url, *impatient))
        # A worker may have outlived the first run, and found the endpoint up again.
        made = {name: count for name, count in result.computed.items() if count}
        assert made.keys() <= {"captions-endpoint", "tokens"}
        assert made["tokens"] == result.counts["kept"] == 6
        found = captions_by_path(tmp_path / "d")
        assert found == {f"{number:02d}.mp4": [caption_of(1000 + 37 * number)] for number in range(6)}
        # All captions are there, so that the next run needs no endpoint.
        server.models = ("another",)
        options = [*impatient, "thresholds.max_flash_share=null"]
        curate(endpoint_config(some, tmp_path / "d", tokenizer_file, server.url, *options))
        server.models = ("another",)
        with pytest.raises(UserError, match="another"):
            curate(endpoint_config(some, tmp_path / "e", tokenizer_file, server.url))
    with pytest.raises(UserError, match="no endpoint answers at http://127"):
        curate(endpoint_config(some, tmp_path / "e", tokenizer_file, server.url))
    assert not (tmp_path / "e").exists()


def test_a_text_is_kept_once_by_whoever_said_it_first():
    said = [{"text": "a", "captioner": "x"}, {"text": "b", "captioner": "x"}, {"text": "a", "captioner": "y"}]
    assert unique_captions(said) == said[:2]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A red square moves to the right over a gray wall.", None),
        ("Ein rotes Quadrat bewegt sich vor einer grauen Wand nach rechts.", "language de"),
        ("too short", "words 2 < 3"),
        ("word " * 30, "words 30 > 20"),
    ],
)
def test_captions_are_checked_for_length_and_language(text, fault):
    config = CaptionConfig(min_words=3, max_words=20, languages=("en",))
    assert caption_fault(text, config) == fault


def test_faults_are_counted_and_told():
    config = CaptionConfig(min_words=3, languages=("en",))
    curation = CurateConfig(dataset="-", source=SourceConfig(path="-"), captions=config)
    step = Caption(curation, CaptionSource("metadata", {}))
    rows = [["one two three"], ["short", "Das ist ganz sicher ein deutscher Satz über Wände."], []]
    said = [{"captions": [{"text": text, "captioner": "x"} for text in texts]} for texts in rows]
    schema = pa.schema([CAPTIONED.field(name) for name in ("captions", "input_tokens", "output_tokens", "error")])
    captions = step.gather(np.array([7, 8, 9]), {"given": pa.Table.from_pylist(said, schema=schema)})
    assert [len(own) for own in captions.of.to_pylist()] == [1, 0, 0]
    assert captions.take(np.array([7, 9])).to_pylist() == [[{"text": "one two three", "captioner": "x"}], []]
    assert captions.faults == {
        8: ("rejected", "caption: words 1 < 3; language de"),
        9: ("rejected", "caption: none"),
    }
    assert captions.left_out == {"words < 3": 1, "language de": 1}
