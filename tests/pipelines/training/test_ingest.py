from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch

from lumos.config import TokenizerInfo
from lumos.layout import parse
from pipelines.data.settings import PublishConfig
from pipelines.data.snapshot.write import write_snapshot as write_published
from pipelines.errors import UserError
from pipelines.training.config import MixConfig, SourceConfig
from pipelines.training.ingest import StepLoader, StepSource, unpack
from pipelines.training.prepare import prepare
from pipelines.training.rows import clips_of_step, open_rows
from tests.pipelines.data.snapshots import snapshot_content
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ingest")
    dataset = write_snapshot(folder / "dataset", {(2, 4, 4): 13, (3, 4, 6): 8})
    return prepare(tiny_config(dataset, folder / "out"))


def with_config(prepared, *, caption_drop=None, **changes):
    """The run with other keys of its config."""
    if caption_drop is not None:
        changes["data"] = replace(prepared.config.data, caption_drop=caption_drop)
    return replace(prepared, config=replace(prepared.config, **changes))


def batches(loader, steps):
    """A loader's batches of successive steps."""
    return [batch for table in loader(stretch(steps)) for batch in unpack(table)]


def stretch(steps):
    """Successive steps as a loader is told of them."""
    return pa.table({"first": [steps[0]], "stop": [steps[-1] + 1]})


def documents(prepared, num_workers, micro_batch_tokens, steps):
    """Tokens and mask of every document of some steps, whoever loads it."""
    divided = with_config(prepared, micro_batch_tokens=micro_batch_tokens)
    found = []
    for rank in range(num_workers):
        own = batches(StepLoader(divided, rank, num_workers), steps)
        assert [batch.step for batch in own] == list(steps)
        for batch in own:
            assert batch.rows == prepared.config.global_batch
            assert len(batch.micro_batches) == divided.micro_batches(batch.shape, num_workers)
            assert abs(sum(len(micro.layouts) for micro in batch.counted) - batch.rows / num_workers) < 1
            for micro in batch.counted:
                assert prepared.row_tokens(batch.shape) * len(micro.layouts) <= micro_batch_tokens
                sizes = [layout.length for layout in micro.layouts]
                parts = zip(micro.ids.split(sizes), micro.masked_positions.split(sizes), strict=True)
                found += [(batch.step, tuple(ids.tolist()), tuple(masked.tolist())) for ids, masked in parts]
    return sorted(found)


def test_any_number_of_workers_loads_the_same_documents_with_the_same_masks(prepared):
    one = documents(prepared, 1, 1024, range(3, 6))
    assert len(one) == 24
    assert documents(prepared, 2, 210, range(3, 6)) == one
    assert documents(prepared, 4, 110, range(3, 6)) == one
    assert documents(prepared, 3, 110, range(3, 6)) == one, "8 rows: 2, 3 and 3, in 3 passes of each worker"


def test_layouts_are_those_of_the_tokens(prepared):
    (batch,) = batches(StepLoader(prepared, 0, 2), range(1))
    for micro in batch.micro_batches:
        assert [layout.length for layout in micro.layouts] == sorted(layout.length for layout in micro.layouts)
        for layout, ids in zip(micro.layouts, micro.ids.split([each.length for each in micro.layouts]), strict=True):
            assert parse(prepared.vocabulary, ids.tolist()) == layout


def test_rows_and_captions_are_those_of_the_plan(prepared):
    undropped = with_config(prepared, caption_drop=0.0, micro_batch_tokens=1024)
    loader = StepLoader(undropped, 0, 1)
    step = prepared.plan().step(4)
    (batch,) = batches(loader, range(4, 5))
    (reader,) = open_rows(prepared, ["captions", "codes"])
    wanted = []
    for row in step.rows:
        record = reader.row(step.bucket.index, row)
        texts = [tuple(loader.text_tokenizer.encode(caption["text"])) for caption in record["captions"]]
        wanted.append((tuple(record["codes"]), texts))
    (micro,) = batch.micro_batches
    sizes = [layout.length for layout in micro.layouts]
    for layout, ids in zip(micro.layouts, micro.ids.split(sizes), strict=True):
        codes = tuple((ids[layout.visual_index.flatten()] - prepared.vocabulary.visual_start).tolist())
        text = tuple(ids[1 : ids.tolist().index(prepared.vocabulary.turn_end)].tolist())
        assert any(codes == row_codes and text in texts for row_codes, texts in wanted)


def test_captions_are_dropped_at_the_rate_asked_for(prepared):
    half = with_config(prepared, caption_drop=0.5)
    loader = StepLoader(half, 0, 1)
    first = [ids[0] for step in range(40) for _, ids, _ in split_documents(loader, step)]
    dropped = np.mean(np.array(first) == half.vocabulary.video_start)
    assert 0.4 < dropped < 0.6


def test_masks_differ_between_steps_and_rows(prepared):
    masks = {masked for _, _, masked in documents(prepared, 1, 1024, range(4))}
    assert len(masks) > 24  # of 32; where nearly all cells are masked, some patterns meet by chance


def split_documents(loader, step):
    (batch,) = batches(loader, range(step, step + 1))
    for micro in batch.micro_batches:
        sizes = [layout.length for layout in micro.layouts]
        for ids, masked in zip(micro.ids.split(sizes), micro.masked_positions.split(sizes), strict=True):
            yield step, ids.tolist(), masked


def test_captions_are_cut_to_what_the_model_can_read(prepared):
    undropped = with_config(prepared, caption_drop=0.0, micro_batch_tokens=1024)
    whole = documents(undropped, 1, 1024, range(4))
    longest = max(len(ids) for _, ids, _ in whole)
    cut = documents(replace(undropped, model=replace(undropped.model, max_seq_len=longest - 1)), 1, 1024, range(4))
    assert max(len(ids) for _, ids, _ in cut) == longest - 1
    for (_, ids, masked), (_, cut_ids, cut_masked) in zip(whole, cut, strict=True):
        lost = len(ids) - len(cut_ids)
        assert lost == (len(ids) == longest)
        tail = len(cut_ids) - cut_ids.index(prepared.vocabulary.turn_end)
        assert cut_ids[-tail:] == ids[-tail:]  # the end of the turn and the whole video
        assert cut_ids[:-tail] == ids[: len(ids) - tail - lost]
        assert cut_masked[-tail:] == masked[-tail:]


def test_a_bad_row_is_named(prepared):
    vocabulary = replace(prepared.vocabulary, codebook_size=10)
    with pytest.raises(UserError, match=r"clip \dx4x\d-\d+ of .*codes reach from 0 to 63, outside 0..9"):
        list(islice(split_documents(StepLoader(replace(prepared, vocabulary=vocabulary), 0, 1), 0), 1))


def test_loading_leaves_torch_streams_alone(prepared):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    StepLoader(prepared, 0, 1).load(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_cut_captions_are_counted(prepared):
    undropped = with_config(prepared, caption_drop=0.0, micro_batch_tokens=1024)
    (whole,) = batches(StepLoader(undropped, 0, 1), range(1))
    assert whole.cut_captions == 0
    room = whole.longest_caption - 1
    short = replace(undropped.model, max_seq_len=undropped.row_tokens(whole.shape) + room)
    own = [batches(StepLoader(replace(undropped, model=short), rank, 2), range(1))[0] for rank in range(2)]
    texts = [micro.layouts for batch in own for micro in batch.micro_batches]
    longest = sum(layout.frames[0].start == room + 5 for layouts in texts for layout in layouts)
    assert 0 < sum(batch.cut_captions for batch in own) <= longest
    assert max(batch.longest_caption for batch in own) == room + 1


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run on images and videos of two datasets, one of them with motion scores."""
    folder = tmp_path_factory.mktemp("mixed")
    draw = np.random.default_rng(0)
    shapes = [(1, 4, 4)] * 20 + [(2, 4, 4)] * 12
    clips = {f"s{number:02d}:0": draw.integers(0, 64, shape) for number, shape in enumerate(shapes)}
    config, info = PublishConfig(val_share=0.0), TokenizerInfo("fsq", 64, (4, 8, 8), "sha256:test")
    content = snapshot_content(clips, tokenizer=info, config=config)
    place = content.clips.schema.get_field_index("motion")
    scores = pa.array([None if t == 1 else 0.3 for t in content.clips["t"].to_pylist()], pa.float32())
    content = replace(content, clips=content.clips.set_column(place, "motion", scores))
    uris = [write_published(str(folder / name), content, config).dataset for name in ("ours",)]
    uris.append(str(write_snapshot(folder / "theirs", {(2, 4, 4): 8, (3, 4, 4): 9})))
    run = tiny_config(folder, folder / "out", image_batch=4, global_batch=2, num_workers=2)
    sources = tuple(SourceConfig(dataset=uri, weight=1) for uri in uris)
    data = replace(run.data, dataset=None, sources=sources, mix=MixConfig(image=1, video=1), caption_drop=0.0)
    return prepare(replace(run, data=data))


def test_a_mixture_is_read_in_one_order_by_any_number_of_workers(mixed):
    steps = range(12)
    own = [batches(StepLoader(mixed, rank, 2), steps) for rank in range(2)]
    alone = batches(StepLoader(mixed, 0, 1), steps)
    for one, *parts in zip(alone, *own, strict=True):
        assert {(part.shape, part.dataset, part.rows) for part in parts} == {(one.shape, one.dataset, one.rows)}
        assert one.rows == (4 if one.shape[0] == 1 else 2)
        assert tokens_of(one) == sorted([*tokens_of(parts[0]), *tokens_of(parts[1])])
    assert [batch.shape[0] == 1 for batch in alone] == [True, False] * 6
    assert {batch.dataset for batch in alone if batch.shape[0] > 1} == {0, 1}
    resumed = batches(StepLoader(mixed, 0, 1), range(7, 12))
    assert [tokens_of(batch) for batch in resumed] == [tokens_of(batch) for batch in alone[7:]]


def tokens_of(batch):
    found = []
    for micro in batch.micro_batches:
        found += [tuple(ids.tolist()) for ids in micro.ids.split([layout.length for layout in micro.layouts])]
    return sorted(found)


def test_the_rows_of_a_step_have_names(mixed):
    plan = mixed.plan()
    for index in range(8):
        (snapshot, clips), step = clips_of_step(mixed, index), plan.step(index)
        assert snapshot == mixed.datasets[step.bucket.dataset].uri
        reader = open_rows(mixed, ["clip_id"])[step.bucket.dataset]
        assert clips == [reader.row(step.bucket.index, row)["clip_id"] for row in step.rows]
        prefix = "s" if step.bucket.dataset == 0 else "x".join(map(str, step.bucket.shape))
        assert all(clip.startswith(prefix) for clip in clips)


def test_how_much_moves_is_said_in_prompts_of_videos(mixed):
    ours = mixed.datasets[:1]
    data = replace(mixed.config.data, dataset=ours[0].uri, sources=(), motion_prefix=True)
    run = prepare(replace(mixed.config, data=data))
    assert run.info.motion_prefix
    loader = StepLoader(run, 0, 1)
    prefix = tuple(loader.text_tokenizer.encode("motion 7: the clip"))[:-1]  # of a score of 0.3
    said = {True: [], False: []}
    for batch in batches(loader, range(160)):
        said[batch.shape[0] == 1] += [prefix == ids[1 : 1 + len(prefix)] for ids in tokens_of(batch)]
    assert not any(said[True]), "an image does not move"
    assert 0.8 < np.mean(said[False]) < 0.98, "left out now and then, so that a prompt may lack it"


@pytest.mark.parametrize("remaining", [1, 5, 200_000, 1_000_000_007])
def test_read_tasks_do_not_grow_with_the_steps_to_come(remaining):
    tasks = StepSource(17, 17 + remaining).get_read_tasks(1000)
    assert len(tasks) == min(remaining, 256)
    stretches = [row for task in tasks for block in task() for row in block.to_pylist()]
    assert stretches[0]["first"] == 17
    assert stretches[-1]["stop"] == 17 + remaining
    assert all(one["stop"] == next_one["first"] for one, next_one in pairwise(stretches))
    assert sum(stretch["stop"] - stretch["first"] for stretch in stretches) == remaining


def test_a_loader_makes_steps_when_they_are_asked_for(prepared, monkeypatch):
    made = []
    load = StepLoader.load
    monkeypatch.setattr(StepLoader, "load", lambda self, step: made.append(step) or load(self, step))
    tables = StepLoader(prepared, 0, 2)(stretch(range(100, 100_000)))
    assert [batch.step for batch in unpack(next(tables))] == made == list(range(100, 108))
    assert [batch.step for batch in unpack(next(tables))] == list(range(108, 116))
