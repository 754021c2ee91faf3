from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch

from lumos.layout import parse
from pipelines.training.batch_plan import BatchPlan
from pipelines.training.ingest import ShardCache, StepLoader, unpack
from pipelines.training.prepare import prepare
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


def documents(prepared, num_workers, micro_batch, steps):
    """Tokens and mask of every document of some steps, whoever loads it."""
    divided = with_config(prepared, num_workers=num_workers, micro_batch=micro_batch)
    found = []
    for rank in range(num_workers):
        loader = StepLoader(divided, rank)
        batches = [unpack(loader(pa.table({"step": [step]})), micro_batch) for step in steps]
        assert [batch.step for batch in batches] == list(steps)
        for batch in batches:
            assert len(batch.micro_batches) == prepared.config.global_batch // (num_workers * micro_batch)
            for micro in batch.micro_batches:
                assert len(micro.layouts) == micro_batch
                sizes = [layout.length for layout in micro.layouts]
                parts = zip(micro.ids.split(sizes), micro.masked_positions.split(sizes), strict=True)
                found += [(batch.step, tuple(ids.tolist()), tuple(masked.tolist())) for ids, masked in parts]
    return sorted(found)


def test_any_number_of_workers_loads_the_same_documents_with_the_same_masks(prepared):
    one = documents(prepared, 1, 8, range(3, 6))
    assert len(one) == 24
    assert documents(prepared, 2, 2, range(3, 6)) == one
    assert documents(prepared, 4, 1, range(3, 6)) == one


def test_layouts_are_those_of_the_tokens(prepared):
    batch = unpack(StepLoader(prepared, 0)(pa.table({"step": [0]})), prepared.config.micro_batch)
    for micro in batch.micro_batches:
        assert [layout.length for layout in micro.layouts] == sorted(layout.length for layout in micro.layouts)
        for layout, ids in zip(micro.layouts, micro.ids.split([each.length for each in micro.layouts]), strict=True):
            assert parse(prepared.vocabulary, ids.tolist()) == layout


def test_rows_and_captions_are_those_of_the_plan(prepared):
    plan = BatchPlan.from_manifest(prepared.snapshot.manifest, prepared.config)
    undropped = with_config(prepared, caption_drop=0.0, num_workers=1, micro_batch=8)
    loader = StepLoader(undropped, 0)
    step = plan.step(4)
    batch = unpack(loader(pa.table({"step": [4]})), 8)
    cache = ShardCache(prepared.snapshot, max_bytes=1)
    wanted = []
    for row in step.rows:
        record = cache.row(prepared.snapshot.manifest.buckets[step.bucket.index].shards, row)
        texts = [tuple(loader.text_tokenizer.encode(caption["text"])) for caption in record["captions"]]
        wanted.append((tuple(record["codes"]), texts))
    (micro,) = batch.micro_batches
    sizes = [layout.length for layout in micro.layouts]
    for layout, ids in zip(micro.layouts, micro.ids.split(sizes), strict=True):
        codes = tuple((ids[layout.visual_index.flatten()] - prepared.vocabulary.visual_start).tolist())
        text = tuple(ids[1 : ids.tolist().index(prepared.vocabulary.turn_end)].tolist())
        assert any(codes == row_codes and text in texts for row_codes, texts in wanted)


def test_captions_are_dropped_at_the_rate_asked_for(prepared):
    half = with_config(prepared, caption_drop=0.5, num_workers=1)
    loader = StepLoader(half, 0)
    first = [ids[0] for step in range(40) for _, ids, _ in split_documents(loader, step)]
    dropped = np.mean(np.array(first) == half.vocabulary.video_start)
    assert 0.4 < dropped < 0.6


def test_masks_differ_between_steps_and_rows(prepared):
    masks = {masked for _, _, masked in documents(prepared, 1, 8, range(4))}
    assert len(masks) > 24  # of 32; where nearly all cells are masked, some patterns meet by chance


def split_documents(loader, step):
    batch = unpack(loader(pa.table({"step": [step]})), loader.run.config.micro_batch)
    for micro in batch.micro_batches:
        sizes = [layout.length for layout in micro.layouts]
        for ids, masked in zip(micro.ids.split(sizes), micro.masked_positions.split(sizes), strict=True):
            yield step, ids.tolist(), masked


def test_captions_are_cut_to_what_the_model_can_read(prepared):
    undropped = with_config(prepared, caption_drop=0.0, num_workers=1, micro_batch=8)
    whole = documents(undropped, 1, 8, range(4))
    longest = max(len(ids) for _, ids, _ in whole)
    cut = documents(replace(undropped, model=replace(undropped.model, max_seq_len=longest - 1)), 1, 8, range(4))
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
    with pytest.raises(ValueError, match=r"clip \dx4x\d-\d+ of .*codes reach from 0 to 63, outside 0..9"):
        list(islice(split_documents(StepLoader(replace(prepared, vocabulary=vocabulary), 0), 0), 1))


def test_loading_leaves_torch_streams_alone(prepared):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    StepLoader(prepared, 0).load(0)
    assert torch.equal(torch.get_rng_state(), before)
