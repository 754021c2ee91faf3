import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lumos.checkpoint import ModelInfo, save_checkpoint
from lumos.config import SamplingConfig, TokenizerConfig
from lumos.decoder import Decoder
from lumos.tokenizers.text import TextTokenizer
from lumos.vocabulary import Vocabulary
from pipelines.data.snapshot.read import open_snapshot
from pipelines.errors import UserError
from pipelines.training.config import SourceConfig
from pipelines.training.output import Output
from pipelines.training.prepare import prepare
from pipelines.training.resume import describe_fork, held
from tests.pipelines.training.runs import TINY, tiny_config
from tests.pipelines.training.snapshots import CODEBOOK, write_snapshot


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("dataset"), {(2, 4, 4): 13, (3, 4, 6): 8})


@pytest.fixture
def config(dataset, tmp_path):
    return tiny_config(dataset, tmp_path / "out")


def save_model(path: Path, vocabulary: Vocabulary, **changes: int) -> Path:
    save_checkpoint(path, Decoder(replace(TINY, **changes).resolve(vocabulary.vocab_size)), vocabulary)
    return path


def test_a_good_config_is_prepared(config):
    prepared = prepare(config)
    info = prepared.info
    assert (info.shapes, info.fps) == (((2, 4, 4), (3, 4, 6)), 12.0)
    assert info.dataset_digest == prepared.datasets[0].digest
    assert info.text_tokenizer_hash == TextTokenizer.load().hash
    assert prepared.vocabulary.codebook_size == CODEBOOK
    assert ModelInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_too_few_rows_is_an_error(config):
    with pytest.raises(UserError, match="21 training rows, fewer than a batch of global_batch = 24"):
        prepare(replace(config, global_batch=24))
    with pytest.raises(UserError, match="= 24: set global_batch to at most 20, or curate"):  # a multiple again
        prepare(replace(config, global_batch=24, num_workers=4))
    with pytest.raises(UserError, match="= 24: lower global_batch and num_workers = 24, or curate"):
        prepare(replace(config, global_batch=24, num_workers=24))


def test_a_missing_dataset_is_an_error(config, tmp_path):
    with pytest.raises(UserError, match=r"nowhere holds no published snapshot; make one with `lumos curate`"):
        prepare(replace(config, data=replace(config.data, dataset=str(tmp_path / "nowhere"))))


def test_a_store_that_does_not_answer_is_told_within_seconds(config, monkeypatch):
    for name, value in (
        ("ENDPOINT_URL", "http://127.0.0.1:9"),
        ("ACCESS_KEY_ID", "test"),
        ("SECRET_ACCESS_KEY", "test"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    silent = r"store: http://127.0.0.1:9\); check AWS_ENDPOINT_URL, and that the store is up"
    with pytest.raises(UserError, match=rf"s3://bucket/ds cannot be used: .*{silent}"):
        prepare(replace(config, data=replace(config.data, dataset="s3://bucket/ds")))
    with pytest.raises(UserError, match=rf"s3://bucket/base cannot be used: .*{silent}"):
        prepare(replace(config, init_from="s3://bucket/base"))
    with pytest.raises(UserError, match=rf"fork_from = s3://bucket/run@3 cannot be used: .*{silent}"):
        describe_fork("s3://bucket/run@3")


def test_a_dataset_that_is_a_file_is_an_error(config, tmp_path):
    (tmp_path / "list.csv").touch()
    with pytest.raises(UserError, match=r"dataset = \S*list.csv is a file; name the folder of a dataset"):
        prepare(replace(config, data=replace(config.data, dataset=str(tmp_path / "list.csv"))))


def test_a_split_that_is_not_there_is_an_error(config, tmp_path):
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13}, held_out={(2, 4, 4): 2})
    asked = replace(config, data=replace(config.data, dataset=str(dataset), split="tset"))
    with pytest.raises(UserError, match=r"data.split: no split 'tset'; there are train, val"):
        prepare(asked)


def test_codes_beyond_the_manifests_codebook_are_an_error_before_the_work(config, tmp_path):
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13})
    (file,) = dataset.glob("snapshots/*/manifest.json")
    file.write_text(file.read_text().replace(f'"codebook_size": {CODEBOOK}', '"codebook_size": 16'))
    with pytest.raises(
        UserError, match=r"manifest.json says codebook_size = 16 of the tokenizer, and clip \S+ has the "
    ):
        prepare(replace(config, data=replace(config.data, dataset=str(dataset))))


def test_a_snapshot_of_another_tokenizer_is_an_error(config):
    asked = replace(config, data=replace(config.data, tokenizer=TokenizerConfig()))
    with pytest.raises(UserError, match=r"made by the tokenizer fsq \(64 codes, weights sha256:test\), not by fsq"):
        prepare(asked)


def test_a_missing_tokenizer_file_is_an_error(config):
    visual = replace(config.data, tokenizer=TokenizerConfig(path="/none/weights.safetensors"))
    with pytest.raises(UserError, match=r"data.tokenizer: .*/none/weights.safetensors"):
        prepare(replace(config, data=visual))
    with pytest.raises(UserError, match=r"text tokenizer /none/text.json is not a file"):
        prepare(replace(config, data=replace(config.data, text_tokenizer="/none/text.json")))


def test_frames_that_cannot_be_written_are_an_error(config):
    with pytest.raises(UserError, match=r"bucket 2x4x4 .*set data.grid_unit to 32 px"):
        prepare(replace(config, data=replace(config.data, grid_unit=64)))
    with pytest.raises(UserError, match=r"sequences of \d+ tokens and more, model.max_seq_len is 40"):
        prepare(replace(config, model=replace(config.model, max_seq_len=40)))


def test_a_checkpoint_of_another_shape_or_vocabulary_is_an_error(config, tmp_path):
    text = TextTokenizer.load().vocab_size
    ours = Vocabulary.compact(text, CODEBOOK)
    good = save_model(tmp_path / "good", ours)
    prepare(replace(config, init_from=str(good)))
    wide = save_model(tmp_path / "wide", ours, hidden_size=96)
    with pytest.raises(UserError, match=r"another shape: it has hidden_size = 96; this run has hidden_size = 64"):
        prepare(replace(config, init_from=str(wide)))
    coarse = save_model(tmp_path / "coarse", replace(ours, grid_unit=32))
    with pytest.raises(UserError, match=r"another vocabulary: it has grid_unit = 32; this run has grid_unit = 16"):
        prepare(replace(config, init_from=str(coarse)))
    with pytest.raises(UserError, match=r"init_from: .*none is not a checkpoint"):
        prepare(replace(config, init_from=str(tmp_path / "none")))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text("{}")
    prepare(replace(config, init_from=str(tmp_path / "none"), output=str(begun)))  # its weights are not asked for


def two_sources(config, dataset, other, **values):
    chosen = tuple(SourceConfig(dataset=str(path), **values) for path in (dataset, other))
    return replace(config, data=replace(config.data, dataset=None, sources=chosen))


def test_several_datasets_are_prepared_in_their_order(config, dataset, tmp_path):
    other = write_snapshot(tmp_path / "other", {(1, 4, 4): 9, (2, 4, 4): 7})
    prepared = prepare(two_sources(config, dataset, other, weight=1))
    digests = [open_snapshot(str(path)).digest for path in (dataset, other)]
    assert [snapshot.digest for snapshot in prepared.datasets] == digests
    assert prepared.dataset_digest not in digests
    assert prepared.dataset_names == ("dataset0", "other")
    assert prepared.info.shapes == ((2, 4, 4), (3, 4, 6), (1, 4, 4))
    assert prepared.info.dataset_digest == prepared.dataset_digest
    turned = prepare(two_sources(config, other, dataset, weight=1))
    assert turned.dataset_digest != prepared.dataset_digest, "rows have other ids then"
    assert turned.info.shapes == ((2, 4, 4), (3, 4, 6), (1, 4, 4)), "a video is what is drawn by default"
    heavier = prepare(two_sources(config, dataset, other, repeat=1))
    assert heavier.config.identity_hash() != prepared.config.identity_hash()
    elsewhere = two_sources(config, tmp_path / "a copy", other, weight=1)
    assert elsewhere.identity_hash() == prepared.config.identity_hash(), "the digests stand for the places"


def test_sources_that_do_not_go_together_are_named(config, dataset, tmp_path):
    other = write_snapshot(tmp_path / "foreign", {(2, 4, 4): 7}, tokenizer_hash="sha256:else")
    with pytest.raises(UserError, match=r"foreign\S* was made by the tokenizer .*sha256:else\), not by .*sha256:test"):
        prepare(two_sources(config, dataset, other))
    with pytest.raises(UserError, match=r"data.sources: \S*again is the same snapshot as \S*: give it one entry"):
        prepare(two_sources(config, dataset, shutil.copytree(dataset, tmp_path / "again")))


def test_rows_longer_than_a_micro_batch_are_an_error(config):
    prepared = prepare(replace(config, micro_batch_tokens=103))
    assert [prepared.micro_batches(shape, 2) for shape in prepared.info.shapes] == [4, 4]
    assert [prepared.micro_batches(shape, 1) for shape in prepared.info.shapes] == [8, 8]
    roomy = prepare(replace(config, micro_batch_tokens=240))
    assert [roomy.micro_batches(shape, 2) for shape in roomy.info.shapes] == [1, 2]
    with pytest.raises(UserError, match=r"bucket 3x4x6 .* rows of 103 tokens, more than micro_batch_tokens = 102: set"):
        prepare(replace(config, micro_batch_tokens=102))


def test_a_motion_prefix_needs_scores_in_the_snapshot(config):
    asked = replace(config, data=replace(config.data, motion_prefix=True))
    with pytest.raises(UserError, match=r"was published without motion scores: give the `lumos curate` that made it"):
        prepare(asked)


def test_a_run_in_the_order_of_older_programs_is_told_from_todays(config):
    older = replace(config, data=replace(config.data, order=1))
    Output(older, snapshot_digest="a" * 64).begin(older)
    with pytest.raises(UserError, match=r"holds another run \(data.order: 1 there, 2 asked for\): name another output"):
        Output(config, snapshot_digest="a" * 64)


def test_each_run_has_a_folder_of_its_own_in_shared_storage(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = replace(config, checkpoint=replace(config.checkpoint, storage="shared"))

    def storage(digest="a" * 64, **changes):
        return Output(replace(shared, **changes), snapshot_digest=digest).storage

    assert storage().startswith(f"{tmp_path}/shared/lumos-")
    assert storage() == storage(output=str(tmp_path / "elsewhere"), progress=True)
    assert len({storage(), storage(seed=1), storage(digest="b" * 64)}) == 3
    with pytest.raises(
        UserError, match=r"checkpoint.storage = nope://x cannot be used .*: name a folder or an s3:// URI"
    ):
        Output(replace(config, checkpoint=replace(config.checkpoint, storage="nope://x")), snapshot_digest="a" * 64)


def test_two_drivers_cannot_train_into_one_output(config):
    first, second = (Output(config, snapshot_digest="a" * 64) for _ in range(2))
    with held(first):
        with pytest.raises(UserError, match=r"is in use by another run .*: wait for it"), held(second):
            pass
        assert Output(config, snapshot_digest="a" * 64)  # the lock alone is no other run
    with held(second):
        pass


def test_an_output_of_a_newer_program_is_refused(config, tmp_path):
    Output(config, snapshot_digest="a" * 64).begin(config)
    file = tmp_path / "out" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match=r"run.json was written by a newer lumos \(it has format\): install"):
        Output(config, snapshot_digest="a" * 64)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"run.json cannot be read"):
        Output(config, snapshot_digest="a" * 64)


def test_an_output_of_another_run_is_an_error(config, tmp_path):
    Output(config, snapshot_digest="a" * 64).begin(config)
    assert Output(replace(config, progress=True), snapshot_digest="a" * 64).run.key
    with pytest.raises(UserError, match=r"holds another run \(seed: 0 there, 1 asked for\): name another output"):
        Output(replace(config, seed=1), snapshot_digest="a" * 64)
    with pytest.raises(
        UserError, match=r"holds another run \(snapshot: it is on one with the digest aaaaaaaaaaaaaaaa, w"
    ):
        Output(config, snapshot_digest="b" * 64)
    snapshot = open_snapshot(config.data.dataset)
    earlier = replace(config, output=str(tmp_path / "earlier"))
    Output(earlier, snapshot_digest=snapshot.digest).begin(earlier)
    with pytest.raises(
        UserError, match=rf"snapshot: it is on v0001-\w+, which data.dataset={snapshot.uri} names\): name"
    ):
        Output(earlier, snapshot_digest="b" * 64)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no training run"):
        Output(replace(config, output=str(tmp_path / "letters")), snapshot_digest="a" * 64)
    assert (
        Output(replace(config, output=f"file://{tmp_path}/a%20b"), snapshot_digest="a" * 64).folder == tmp_path / "a b"
    )


def test_what_differs_is_counted_and_a_fork_is_named(config, tmp_path):
    Output(config, snapshot_digest="a" * 64).begin(config)
    optimizer = replace(config.optimizer, lr=1e-5, eps=1e-6, beta1=0.8, beta2=0.9, weight_decay=0.0)
    asked = replace(config, seed=1, optimizer=optimizer, data=replace(config.data, caption_drop=0.5), precision="bf16")
    fork = rf"and 2 more\): name another output, with fork_from={tmp_path / 'out'} to begin with what that one has"
    with pytest.raises(UserError, match=fork):
        Output(asked, snapshot_digest="a" * 64)
    wider = replace(config, model=replace(config.model, hidden_size=128))
    with pytest.raises(UserError, match=r"128 asked for\): name another output; or ask for the same run"):
        Output(wider, snapshot_digest="a" * 64)


def test_the_model_recommends_what_its_run_says(config):
    sampling = SamplingConfig(num_steps=12, guidance_scale=2.0)
    recommending = replace(config, recommended_sampling=sampling)
    assert prepare(recommending).info.sampling == sampling
    assert prepare(config).info.sampling == SamplingConfig()
    assert recommending.identity_hash() == config.identity_hash()  # it computes the same: an older run continues
