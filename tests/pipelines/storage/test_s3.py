"""Curation from and to an object store that fails now and then, against the same curation on a local disk."""

import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest
from click.testing import CliRunner

from jobs.data import command as data_command
from pipelines import storage
from pipelines.data.curate import curate
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.stage.columns import parquet_bytes
from pipelines.data.stage.table import read_columns, table_parts
from pipelines.data.steps.sources import hash_file
from pipelines.data.upkeep.report import write_report
from pipelines.errors import JobError, UserError
from pipelines.storage import lock
from pipelines.storage.lock import check_lock, dataset_lock
from pipelines.storage.store import S3Store
from pipelines.training import checkpoints
from pipelines.training.export import export
from tests.pipelines.data.corpora import curate_config, published, write_corpus
from tests.pipelines.data.small_models import COCA, write_open_clip, write_text_detector
from tests.pipelines.data.videos import still, write_video
from tests.pipelines.data.vision_server import MODEL, VisionServer, card
from tests.pipelines.storage.faults import KINDS, PAGE_KEYS
from tests.pipelines.storage.test_s3_lock import OTHER_OWNER
from tests.pipelines.training.test_checkpoints import STEP, write_checkpoint

FAULTS = 0.1  # of requests, where all kinds of faults are to occur in a short test


def upload(direct, folder, uri):
    for path in folder.iterdir():
        direct.pipe_file(f"{uri.removeprefix('s3://')}/{path.name}", path.read_bytes())
    return uri


@pytest.fixture
def access(proxy, direct, bucket, files, tokenizer_file):
    return proxy, files, upload(direct, files, f"{bucket}/videos"), tokenizer_file


def report(what, proxy, begin):
    """Seen with --log-cli-level=INFO."""
    seconds, requests = time.monotonic() - begin, sum(proxy.requests.values())
    logging.info("%s: %.1f s, %d requests %s, %s", what, seconds, requests, proxy.requests, proxy.faults)


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_exactly_once_through_a_store_that_fails(ray, proxy, direct, bucket, files, tokenizer_file, tmp_path):
    local = published(open_snapshot(curate(curate_config(files, tmp_path / "d", tokenizer_file)).snapshot_uri))
    source = upload(direct, files, f"{bucket}/more videos")
    proxy.share, begin = FAULTS, time.monotonic()
    config = curate_config(source, f"{bucket}/data set", tokenizer_file, "resources.workers=2")
    result = curate(config)
    report("curation with faults", proxy, begin)
    assert set(proxy.faults) == set(KINDS)
    proxy.share = 0.0
    assert published(open_snapshot(result.snapshot_uri)) == local
    assert not direct.exists(f"{bucket}/data set/.lock")
    proxy.requests, proxy.paths, begin = Counter(), [], time.monotonic()
    assert sum(curate(config).computed.values()) == 0
    report("a run that finds all done", proxy, begin)
    parts = [line for line in proxy.paths if "/part-" in line]
    assert max(Counter(parts).values()) <= 3
    assert len(proxy.paths) - len(parts) < 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exactly_once_with_two_percent_faults_and_a_kill(proxy, ray, direct, bucket, tokenizer_file, tmp_path):
    files = write_corpus(tmp_path / "videos", good=200)
    (files / "link.mp4").unlink()
    local = published(open_snapshot(curate(curate_config(files, tmp_path / "d", tokenizer_file)).snapshot_uri))
    source, dataset = upload(direct, files, f"{bucket}/videos"), f"{bucket}/dataset"
    proxy.share, begin = 0.02, time.monotonic()
    code = (
        "import sys; from pipelines.data.curate import curate; from tests.pipelines.data.corpora import curate_config\n"
        "curate(curate_config(*sys.argv[1:], 'resources.workers=2'))"
    )
    first = subprocess.Popen([sys.executable, "-c", code, source, dataset, str(tokenizer_file)])
    while not direct.glob(f"{dataset.removeprefix('s3://')}/stages/split/*/part-*.parquet"):
        assert first.poll() is None
        time.sleep(0.1)
    config = curate_config(source, dataset, tokenizer_file, "resources.workers=2")
    with pytest.raises(UserError, match=rf"in use by another run \(pid {first.pid} on .* just now: wait for it"):
        curate(config)
    first.kill()
    first.wait()
    report("killed", proxy, begin)
    assert f"locked by pid {first.pid}" in lock.unlock(dataset, force=True)
    result = curate(config)
    report("continued", proxy, begin)
    assert set(proxy.faults) >= {*KINDS} - {"reset_upload"}  # there are few uploads
    proxy.share = 0.0
    assert published(open_snapshot(result.snapshot_uri)) == local


@pytest.mark.slow
def test_a_store_that_does_not_fail_is_asked_once_for_each_thing(ray, proxy, direct, bucket, files, tokenizer_file):
    config = curate_config(upload(direct, files, f"{bucket}/videos"), f"{bucket}/dataset", tokenizer_file)
    begin = time.monotonic()
    first = curate(config)
    report("curation without faults", proxy, begin)
    videos = len(list(files.glob("*.mp4")))
    parts = [line for line in proxy.paths if "/part-" in line]
    gets = [line for line in proxy.paths if line.startswith("GET") and ".mp4" in line]
    # Each file is fetched to be hashed; each content to be split; each kept clip to be encoded.
    assert len(gets) == videos + (videos - 1) + first.counts["kept"]
    known = {*gets, *parts}
    others = [line for line in proxy.paths if line not in known and "/.lock" not in line]  # renewed by the clock
    report(f"{len(gets)} for videos, {len(parts)} for parts of tables, {len(others)} others", proxy, begin)
    assert len(others) < 60


def card_videos(folder, files=4, shots=3):
    """Videos of several shots, each of which shows a number for as long as a clip lasts; and one that is rejected."""
    folder.mkdir()
    for file in range(files):
        cards = [np.frombuffer(card(1000 + 37 * (shots * file + shot)), np.uint8) for shot in range(shots)]
        pictures = np.stack([cv2.imdecode(data, cv2.IMREAD_COLOR) for data in cards])
        write_video(folder / f"{file}.mp4", np.repeat(pictures, 18, axis=0))
    write_video(folder / "black.mp4", still(18, level=0))
    return folder


def codes_by_clip(result):
    snapshot = open_snapshot(result.snapshot_uri)
    shards = [shard for bucket in snapshot.manifest.buckets for shard in bucket.shards]
    return {row["clip_id"]: row["codes"] for shard in shards for row in snapshot.read_shard(shard).to_pylist()}


@pytest.mark.slow  # a whole curation
@pytest.mark.timeout(600)
def test_a_remote_source_is_fetched_three_times_at_most_whoever_looks_at_it(
    ray, proxy, direct, bucket, tokenizer_file, tmp_path
):
    videos = card_videos(tmp_path / "videos")
    models = {
        "features.clip.weights": write_open_clip(tmp_path / "clip"),
        "features.text_detector": write_text_detector(tmp_path / "text.onnx"),
        "captions.coca.weights": write_open_clip(tmp_path / "coca", COCA),
    }
    plain = ["split={detector: stride, max_seconds: 1.5}", "thresholds.min_motion_time=null", "captions.require=false"]
    options = [*plain, *(f"{key}={path}" for key, path in models.items())]
    options += ["captions.captioners=[coca,endpoint]", "captions.coca.max_tokens=4", f"captions.endpoint.model={MODEL}"]
    uri = upload(direct, videos, f"{bucket}/videos")
    with VisionServer() as vision:
        options.append(f"captions.endpoint.url={vision.url}")
        remote = curate(curate_config(uri, f"{bucket}/dataset", tokenizer_file, *options))
    write_report(tmp_path / "report.html", open_snapshot(remote.snapshot_uri))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert remote.counts == {"kept": 12, "rejected": 1, "failed": 0, "duplicate": 0}
    assert page.count("data:image/jpeg") == 3 * 13
    fetched = Counter(line.split()[1] for line in proxy.paths if line.startswith("GET") and ".mp4" in line)
    assert {path.rpartition("/")[2]: count for path, count in fetched.items()} == {
        **{f"{file}.mp4": 3 for file in range(4)},  # to be hashed, split and tokenized
        "black.mp4": 3,  # hashed, split and shown in the report
    }
    local = curate(curate_config(videos, tmp_path / "d", tokenizer_file, *plain))
    assert codes_by_clip(remote) == codes_by_clip(local)


# --------------------------------------------------------------------------------------------------- single operations


def test_files_survive_every_kind_of_fault(proxy, direct, bucket):
    data = os.urandom(5 << 20)
    proxy.share, begin = 0.2, time.monotonic()
    for index in range(12):
        uri = f"{bucket}/set/{index}.bin"
        storage.write_bytes_atomic(uri, data if index == 0 else data[: 1 << index % 17])
        assert direct.cat_file(uri.removeprefix("s3://")) == storage.read_bytes(uri)
        assert storage.exists(uri)
        assert storage.is_dir(f"{bucket}/set")
    assert storage.sha256_file(f"{bucket}/set/0.bin") == hashlib.sha256(data).hexdigest()
    assert len(storage.list_files(f"{bucket}/set")) == len(storage.list_names(f"{bucket}/set")) == 12
    storage.remove(f"{bucket}/set")
    report("single operations", proxy, begin)
    assert set(proxy.faults) == set(KINDS)
    proxy.share = 0.0
    assert not storage.is_dir(f"{bucket}/set")
    assert direct.find(bucket) == []


def test_an_upload_in_parts_counts_though_the_answer_that_says_so_is_lost(proxy, direct, bucket):
    data = os.urandom(11 << 20)
    proxy.kinds, proxy.share = ["lost_answer"], 0.5
    completions: Counter[str] = Counter()
    while max(completions.values(), default=0) < 2:
        assert len(completions) < 12
        fs, path = storage.filesystem(f"{bucket}/{len(completions)}.bin")
        with fs.open(path, "wb", block_size=5 << 20) as file:
            file.write(data)
        assert direct.cat_file(path) == data
        completions = Counter(line for line in proxy.paths if line.startswith("POST") and "uploadId" in line)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_checkpoints_are_kept_in_a_store_that_fails(proxy, direct, bucket, tmp_path, share):
    uri = f"{bucket}/some/run"
    assert checkpoints.find_checkpoints(uri) == []
    proxy.share = share
    for step in range(1, 4):
        write_checkpoint(tmp_path, f"attempt-{step // 2 + 1:05d}/{STEP.format(step)}", step)
    (tmp_path / "attempt-00002" / STEP.format(2) / "engine" / "part-1").unlink()
    model = tmp_path / "attempt-00002" / STEP.format(3) / "export"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    state = model.with_name("state.json")  # as an older program left its last one, with the model in it
    state.write_text(json.dumps(json.loads(state.read_text()) | {"exported": True}))
    fs, path = storage.arrow_filesystem(uri)
    fs = pickle.loads(pickle.dumps(fs))  # as it goes to workers
    pyarrow.fs.copy_files(str(tmp_path), path, destination_filesystem=fs)
    direct.pipe_file(f"{path}/attempt-00001/", b"")  # as Arrow's own S3 filesystem marked folders
    found = checkpoints.find_checkpoints(uri)
    assert [stored.state.step for stored in found] == [3, 1]
    assert [record.step for record in checkpoints.read_history(found[0])] == [1, 2, 3]
    export(found[0], tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(FileExistsError, match="holds files that are not a checkpoint"):
        export(found[0], tmp_path / "attempt-00001")
    assert checkpoints.next_attempt(uri) == "attempt-00003"
    checkpoints.prune(uri, found[:1])
    assert [stored.state.step for stored in checkpoints.find_checkpoints(uri)] == [3]
    left = [name for name in direct.find(path) if not name.startswith(f"{path}/record/")]
    assert all(name.startswith(f"{path}/attempt-00002/{STEP.format(3)}/") for name in left)
    assert bool(proxy.faults) == bool(share)


@pytest.mark.parametrize(("clips", "limit"), [(64, 600_000), (8, 300_000)])
def test_columns_of_a_part_are_read_without_its_codes(proxy, bucket, clips, limit):
    codes = pa.array(list(np.random.default_rng(0).integers(0, 64000, (clips, 12544), np.uint16)))
    keys = [f"{number:064}" for number in range(clips)]
    columns = {"work_key": keys, "key": keys, "codes": codes, "error": [None] * (clips - 1) + ["broken"]}
    data = parquet_bytes(pa.table(columns), row_group_rows=4096)
    storage.write_bytes_atomic(f"{bucket}/t/part-1.parquet", data)
    [part] = table_parts(f"{bucket}/t")
    proxy.sent = 0
    found = read_columns(part, ["work_key", "error"])
    assert proxy.sent < limit < max(len(data), 500_000)
    assert found.to_pydict() == {"work_key": keys, "error": columns["error"]}
    proxy.kinds = [kind for kind in KINDS if "stalled" not in kind]  # which takes long to notice
    proxy.share = 0.3
    for _ in range(8):
        assert read_columns(part, ["error", "codes"])["codes"].equals(pa.chunked_array([codes]))
    assert len(proxy.faults) >= 3


def test_a_part_that_is_no_parquet_is_told(bucket):
    for content in (b"", b"text", os.urandom(1 << 19)):
        storage.write_bytes_atomic(f"{bucket}/t/part-1.parquet", content)
        with pytest.raises((OSError, pa.ArrowInvalid)):
            read_columns(f"{bucket}/t/part-1.parquet", ["error"])


@pytest.mark.parametrize(
    "name", ["a b.mp4", "ünï 日本.mp4", "1+1.mp4", "c#d.mp4", "100%25.mp4", "a::b?c.mp4", "s*[1].mp4"]
)
def test_any_name_is_listed_read_and_written(direct, bucket, name):
    storage.write_bytes_atomic(f"{bucket}/in/{name}", b"content")
    [found] = storage.list_files(f"{bucket}/in", suffixes=[".mp4"])
    assert (found.path, found.uri, found.size) == (name, f"{bucket}/in/{name}", 7)
    assert storage.list_names(f"{bucket}/in") == [name]
    assert storage.exists(found.uri)
    assert storage.sha256_file(found.uri) == hashlib.sha256(b"content").hexdigest()
    assert direct.find(f"{bucket}/in") == [f"{bucket}/in/{name}".removeprefix("s3://")]


def test_more_keys_than_a_listing_has_on_a_page(proxy, direct, bucket):
    root = bucket.removeprefix("s3://")
    direct.pipe({f"{root}/many/{index:05d}.mp4": b"" for index in range(PAGE_KEYS + 5)})
    direct.pipe({f"{root}/many/folder/": b"", f"{root}/many/.hidden.mp4": b"", f"{root}/many.mp4": b""})
    proxy.share = 0.3
    assert [found.path for found in storage.list_files(f"{bucket}/many")] == [
        f"{index:05d}.mp4" for index in range(PAGE_KEYS + 5)
    ]
    assert len(storage.list_names(f"{bucket}/many")) == PAGE_KEYS + 7
    assert storage.is_dir(f"{bucket}/many")
    assert storage.list_names(f"{bucket}/man") == []
    assert proxy.faults


def test_a_missing_object_is_missing_at_once(proxy, bucket):
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{bucket}/nothing")
    assert not storage.exists(f"{bucket}/nothing")
    storage.remove(f"{bucket}/nothing")
    assert time.monotonic() - begin < 30


def test_a_source_is_not_blamed_for_its_store(proxy, bucket, monkeypatch):
    once = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", once)
    proxy.answer = "503 Service Unavailable", b""
    assert "(transient)" in hash_file(f"{bucket}/a.mp4")["error"]
    proxy.answer = "403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>"
    assert "(permanent)" in hash_file(f"{bucket}/a.mp4")["error"]
    proxy.answer = "403 Forbidden", b"<Error><Code>ExpiredToken</Code></Error>"
    with pytest.raises(UserError, match="ExpiredToken"):
        hash_file(f"{bucket}/a.mp4")


def test_an_outage_is_waited_for(proxy, direct, bucket):
    direct.pipe_file(f"{bucket}/x".removeprefix("s3://"), b"content")
    proxy.answer = "503 Service Unavailable", b""

    def recover():
        proxy.answer = None

    threading.Timer(2.0, recover).start()
    assert storage.read_bytes(f"{bucket}/x") == b"content"


# --------------------------------------------------------------------------------------------------- what cannot work


def break_access(patch, proxy, trouble):
    if trouble == "no credentials":
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
    elif trouble.startswith(("http", "nonsense")):
        patch.setenv("AWS_ENDPOINT_URL", trouble)
    elif trouble:
        proxy.answer = "403 Forbidden", f"<Error><Code>{trouble}</Code><Message>no</Message></Error>".encode()


@pytest.mark.parametrize(
    ("trouble", "source", "message"),
    [
        ("no credentials", "", r"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", "", r"refuses the credentials \(ExpiredToken: .*no\); renew"),
        ("RequestTimeTooSkewed", "", r"refuses this machine's clock .*set the clock"),
        ("AccessDenied", "", r"no .*these credentials may list"),
        ("http://127.0.0.1:9", "", r"store: http://127\.0\.0\.1:9\); check AWS_ENDPOINT_URL"),
        ("nonsense", "", r"nonsense.* check bucket, region and AWS_ENDPOINT_URL"),
        ("", "s3://no-such-bucket/videos", r"does not exist .*create the bucket 'no-such-bucket'"),
        ("", "s3://Bad_Bucket%/videos", r"check bucket, region"),
    ],
)
def test_bad_access_ends_before_any_work(access, tmp_path, monkeypatch, trouble, source, message):
    proxy, files, uri, tokenizer = access
    uri = source or uri
    break_access(monkeypatch, proxy, trouble)
    begin = time.monotonic()
    for config in (curate_config(uri, tmp_path / "d", tokenizer), curate_config(files, uri, tokenizer)):
        with pytest.raises(UserError, match=rf"(?s){uri}.*{message}"):
            curate(config)
    assert time.monotonic() - begin < 60
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("verb", ["status", "report", "verify", "repair", "retry", "remove", "restore", "unlock", "gc"])
def test_upkeep_tells_in_one_line_what_is_wrong_with_its_store(proxy, bucket, monkeypatch, verb):
    def told(uri):
        options = ["a.mp4"] if verb in ("remove", "restore") else []
        error = CliRunner().invoke(data_command, [verb, uri, *options]).exception
        assert isinstance(error, UserError)  # exit status 2
        return str(error)

    assert "create the bucket 'no-such-bucket'" in told("s3://no-such-bucket/d")
    break_access(monkeypatch, proxy, "no credentials")
    S3Store.clear_instance_cache()
    assert "set AWS_ACCESS_KEY_ID" in told(f"{bucket}/d")


# ------------------------------------------------------------------------------------------------------- one at a time


def test_two_runs_on_one_dataset_refuse_each_other(bucket, direct, files, tokenizer_file, monkeypatch):
    message = rf"in use by another run \(pid {os.getpid()} on \S+ since .*\), .* just now: wait for it"
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.2)
    with dataset_lock(f"{bucket}/d"), pytest.raises(UserError, match=message):
        curate(curate_config(files, f"{bucket}/d", tokenizer_file))
    assert direct.find(bucket) == []
    with dataset_lock(f"{bucket}/d"):
        check_lock(f"{bucket}/d")


@pytest.mark.slow  # a curation
def test_a_snapshot_is_not_published_by_a_run_that_lost_its_dataset(
    ray, proxy, direct, bucket, files, tokenizer_file, monkeypatch
):
    source, dataset = upload(direct, files, f"{bucket}/videos"), f"{bucket}/d"
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.2)
    path = f"{dataset}/.lock".removeprefix("s3://")

    def take():
        while not direct.exists(path):
            time.sleep(0.1)
        direct.pipe_file(path, OTHER_OWNER)

    taker = threading.Thread(target=take)
    taker.start()
    with pytest.raises(JobError, match="another run took dataset"):
        curate(curate_config(source, dataset, tokenizer_file))
    taker.join()
    assert not direct.exists(f"{dataset}/snapshots".removeprefix("s3://"))
