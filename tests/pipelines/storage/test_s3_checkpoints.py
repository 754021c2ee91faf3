"""Checkpoints in an object store: made into a model, gone on from by another run, and read by all workers of a node."""

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from jobs.export import command as export_command
from lumos.checkpoint import ModelInfo, load_checkpoint
from lumos.decoder import Decoder
from lumos.tokenizers.text import EMBEDDED_FILE, TextTokenizer
from lumos.vocabulary import Vocabulary
from pipelines.errors import UserError
from pipelines.training.checkpoints import MODEL_FILE, TEXT_TOKENIZER_FILE, ModelFile, checksum
from pipelines.training.export import locate
from pipelines.training.output import Output
from pipelines.training.record import History
from pipelines.training.resume import Beginning, describe_fork, take_over_record
from tests.pipelines.training.runs import TINY, run_ranks, tiny_config
from tests.pipelines.training.test_checkpoints import STEP, write_checkpoint


@pytest.fixture
def run(direct, bucket, tmp_path):
    """A run with one checkpoint, of step 3; and its model. One worker wrote it under ZeRO-0."""
    vocabulary = Vocabulary.compact(TextTokenizer.load().vocab_size, 64)
    model = Decoder(TINY.resolve(vocabulary.vocab_size, vocabulary.visual_start))
    model.init_weights(torch.Generator().manual_seed(0))
    folder = write_checkpoint(tmp_path / "run", f"attempt-00001/{STEP.format(1)}", 3, num_workers=1)
    module = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}
    engine = {"module": module, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(engine, folder / "engine" / "mp_rank_00_model_states.pt")
    described = ModelFile(config=model.config, vocabulary=vocabulary, info=ModelInfo(fps=12.0))
    (folder / MODEL_FILE).write_text(described.to_json())
    (folder / TEXT_TOKENIZER_FILE).write_text(EMBEDDED_FILE.read_text(encoding="utf-8"))
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "worker-00000.json"]
    listed = {
        str(path.relative_to(folder)): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    (folder / "worker-00000.json").write_text(json.dumps(listed))
    direct.put(str(tmp_path / "run"), f"{bucket}/runs/one", recursive=True)
    return f"{bucket}/runs/one", model


def test_a_model_is_exported_out_of_a_store(run, proxy, tmp_path, monkeypatch, direct):
    uri, model = run
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    proxy.share = 0.05
    for number, named in enumerate((uri, f"{uri}@3", f"{uri}/attempt-00001/{STEP.format(1)}/")):
        done = CliRunner().invoke(export_command, [named, str(tmp_path / f"model-{number}"), "--dtype", "fp32"])
        assert done.exit_code == 0, done.output
        assert done.output == f"model of step 3: {tmp_path}/model-{number}\n"
        loaded = load_checkpoint(tmp_path / f"model-{number}")
        assert loaded.info.fps == 12.0
        ours, theirs = loaded.model.state_dict(), model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    done = CliRunner().invoke(export_command, [uri, f"{uri}/model"])
    assert done.output == f"model of step 3: {uri}/model\n"
    assert {Path(path).name for path in direct.find(f"{uri}/model")} >= {"config.json", "model.safetensors"}
    assert direct.cat_file(f"{uri}/model/config.json") == (tmp_path / "model-0" / "config.json").read_bytes()
    direct.rm(f"{uri}/model", recursive=True)
    assert list((tmp_path / "temporary").glob("lumos-*")) == [], "nothing that was fetched is left"


def test_what_cannot_be_exported_out_of_a_store_is_named(run, direct, tmp_path):
    uri, _ = run
    path = f"{uri.removeprefix('s3://')}/attempt-00001/{STEP.format(1)}"
    with pytest.raises(UserError, match=rf"the checkpoint of step 4 was not kept; {uri} has those of steps 3"):
        locate(f"{uri}@4")
    with pytest.raises(UserError, match=r"create the bucket 'not-there'"):
        locate("s3://not-there/run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    (tmp_path / "mine" / "config.json").write_text("{}")  # as other projects have one: the folder would be replaced
    for name, told in {
        "mine": "holds files that are not a checkpoint, such as notes",
        "mine/notes": "is a file",
    }.items():
        done = CliRunner().invoke(export_command, [uri, str(tmp_path / name)])
        assert isinstance(done.exception, UserError)
        assert f"{name} {told}: name " in str(done.exception)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.json", "notes"]
    name = f"{path}/engine/mp_rank_00_model_states.pt"
    content = bytearray(direct.cat_file(name))
    content[len(content) // 2] ^= 1
    direct.pipe_file(name, bytes(content))
    with pytest.raises(UserError, match=rf"^{uri}/attempt.* is damaged \(engine/mp_rank_00_model_states.pt\)"):
        locate(uri)


def test_a_run_is_forked_from_one_whose_checkpoints_are_in_a_store(run, tmp_path):
    uri, _ = run
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "run.json").write_text(json.dumps({"storage": uri}))
    config = tiny_config(tmp_path, tmp_path / "fork", fork_from=f"{parent}@3")
    output = Output(config, snapshot_digest="d", fork=describe_fork)
    output.begin(config)
    history = History(output.metrics_file)
    take_over_record(Beginning(locate(f"{parent}@3"), []), output, history)
    assert history.last_step == 3
    parts = sorted((tmp_path / "fork" / "checkpoints" / "record").iterdir())
    assert [part.name for part in parts] == ["00000001-00000003.jsonl"]


@pytest.mark.slow
def test_the_workers_of_a_node_fetch_a_checkpoint_once(run, proxy, tmp_path):
    uri, _ = run
    run_ranks("engine_ranks", "fetch", tmp_path, f"{uri}/attempt-00001/{STEP.format(1)}")
    assert sum("mp_rank_00_model_states.pt" in line and line.startswith("GET") for line in proxy.paths) == 1


def test_hashing_keeps_nothing_on_the_disk(run, tmp_path, monkeypatch):
    uri, _ = run
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    file = f"attempt-00001/{STEP.format(1)}/engine/mp_rank_00_model_states.pt"
    assert checksum(f"{uri}/{file}") == hashlib.sha256((tmp_path / "run" / file).read_bytes()).hexdigest()
