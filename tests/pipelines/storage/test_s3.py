"""Curation from and to an object store that fails now and then, against the same curation on a local disk."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from pipelines import storage
from pipelines.data.curate import curate
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.stage.columns import parquet_bytes
from pipelines.data.stage.table import read_columns, table_parts
from pipelines.data.steps.sources import hash_file
from pipelines.data.upkeep.report import write_report
from pipelines.errors import JobError, UserError
from pipelines.storage import lock, s3
from pipelines.storage.lock import dataset_lock
from pipelines.storage.store import S3Store
from tests.pipelines.data.corpora import curate_config, published, write_corpus
from tests.pipelines.data.small_models import COCA, write_open_clip, write_text_detector
from tests.pipelines.data.videos import still, write_video
from tests.pipelines.data.vision_server import MODEL, VisionServer, card
from tests.pipelines.storage.faults import KINDS, faulty_proxy, s3_server

FAULTS = 0.1  # of requests, where all kinds of faults are to occur in a short test
_FSSPEC = {"config_kwargs": {"read_timeout": 1.5}}  # seconds that a stalled request costs
_NO_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@pytest.fixture(scope="module")
def server():
    """The server's port, without a proxy before it."""
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def proxy(server):
    """What AWS_ENDPOINT_URL names, here and in Ray's workers."""
    with faulty_proxy(server) as proxy, pytest.MonkeyPatch.context() as patch:
        for name in _NO_CREDENTIALS:
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("FSSPEC_S3", json.dumps(_FSSPEC))
        patch.setitem(fsspec.config.conf, "s3", _FSSPEC)
        yield proxy


@pytest.fixture(autouse=True)
def _calm(proxy):
    """Each test begins and ends without faults, and with clients of its own environment."""
    proxy.share, proxy.answer = 0.0, None
    proxy.faults, proxy.requests, proxy.paths = Counter(), Counter(), []
    S3Store.clear_instance_cache()
    yield
    proxy.share, proxy.answer = 0.0, None
    S3Store.clear_instance_cache()


@pytest.fixture(scope="module")
def direct(server):
    """A client that does not go through the proxy, nor through storage.py."""
    options = {"endpoint_url": f"http://127.0.0.1:{server}", "use_listings_cache": False}
    return S3FileSystem(key="test", secret="test", skip_instance_cache=True, **options)


@pytest.fixture
def bucket(direct, request):
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    direct.mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def ray(proxy, request):
    """A cluster whose workers have the environment that leads to the proxy."""
    return request.getfixturevalue("ray_cluster")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A corpus without what only disks have: links that lead nowhere."""
    folder = write_corpus(tmp_path_factory.mktemp("s3") / "videos")
    (folder / "link.mp4").unlink()
    return folder


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
    with pytest.raises(UserError, match=rf'in use by another run \({{"pid": {first.pid}, .*free \d+ s from now'):
        curate(config)
    first.kill()
    first.wait()
    report("killed", proxy, begin)
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
    others = [line for line in proxy.paths if line not in {*gets, *parts}]
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
    data = os.urandom(33 << 20)  # goes up in parts
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


@pytest.mark.parametrize(("clips", "limit"), [(64, 600_000), (8, 300_000)])
def test_columns_of_a_part_are_read_without_its_codes(proxy, bucket, clips, limit):
    codes = np.random.default_rng(0).integers(0, 64000, (clips, 12544), np.uint16)
    keys = [f"{number:064}" for number in range(clips)]
    columns = {"work_key": keys, "key": keys, "codes": list(codes), "error": [None] * (clips - 1) + ["broken"]}
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
        assert read_columns(part, ["error", "codes"])["codes"].to_pylist() == codes.tolist()
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
    direct.pipe({f"{root}/many/{index:05d}.mp4": b"" for index in range(1005)})
    direct.pipe({f"{root}/many/folder/": b"", f"{root}/many/.hidden.mp4": b"", f"{root}/many.mp4": b""})
    proxy.share = 0.3
    assert [found.path for found in storage.list_files(f"{bucket}/many")][::1004] == ["00000.mp4", "01004.mp4"]
    assert len(storage.list_names(f"{bucket}/many")) == 1007
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


# ------------------------------------------------------------------------------------------------------- one at a time


def test_two_runs_on_one_dataset_refuse_each_other(bucket, direct, files, tokenizer_file):
    told = rf'in use by another run \({{"pid": {os.getpid()}, "host": .*\.lock'
    with dataset_lock(f"{bucket}/d"), pytest.raises(UserError, match=told):
        curate(curate_config(files, f"{bucket}/d", tokenizer_file))
    assert direct.find(bucket) == []
    with dataset_lock(f"{bucket}/d"):
        pass


def test_the_lock_is_held_through_faults_and_by_one_only(proxy, bucket, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)
    proxy.share = 0.3
    with dataset_lock(f"{bucket}/d"):
        begin = time.monotonic()
        while proxy.requests["PUT"] < 6:
            assert time.monotonic() - begin < 60
            time.sleep(0.1)
        with pytest.raises(UserError, match="in use by another run"), dataset_lock(f"{bucket}/d"):
            pass


def other_holder(**changes):
    given = {"pid": 7, "host": "elsewhere", "since": "2026-01-01", "machine": "another", "token": "x", "renewals": 0}
    return json.dumps(given | changes).encode()


def test_a_killed_run_blocks_for_a_minute_elsewhere_and_not_at_all_here(bucket, direct, monkeypatch):
    uri, path = f"{bucket}/d", f"{bucket}/d/.lock".removeprefix("s3://")
    direct.pipe_file(path, other_holder())
    with pytest.raises(UserError, match='"host": "elsewhere"') as refusal, dataset_lock(uri):
        pass
    silent, left = re.search(r"life (\d+) s ago.* free (\d+) s from now", str(refusal.value)).groups()
    assert int(silent) + int(left) in range(59, 62)  # seconds, each rounded by itself
    monkeypatch.setattr(lock, "STALE_SECONDS", 2.0)
    time.sleep(3)
    with dataset_lock(uri):
        assert json.loads(direct.cat_file(path))["pid"] == os.getpid()
    monkeypatch.setattr(lock, "STALE_SECONDS", 60.0)
    ended = subprocess.Popen(["true"])
    ended.wait()
    direct.pipe_file(path, other_holder(pid=ended.pid, machine=lock._machine()))
    with dataset_lock(uri):
        pass
    direct.pipe_file(path, b"not ours")
    with pytest.raises(UserError, match="unknown"), dataset_lock(uri):
        pass


def test_a_run_that_lost_its_dataset_is_stopped(bucket, direct, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.2)
    path = f"{bucket}/d/.lock".removeprefix("s3://")

    def lose():
        with dataset_lock(f"{bucket}/d"):
            direct.pipe_file(path, other_holder())
            time.sleep(30)
        pytest.fail("was not stopped")

    with pytest.raises(JobError, match=r"another run took dataset .* over"):
        lose()
    assert json.loads(direct.cat_file(path))["host"] == "elsewhere"


def test_a_conditional_write_whose_answer_was_lost_is_told(bucket):
    tag = s3.write_object_if(f"{bucket}/x", b"1", tag=None)
    with pytest.raises(FileExistsError):
        s3.write_object_if(f"{bucket}/x", b"2", tag=None)
    other = s3.write_object_if(f"{bucket}/x", b"2", tag=tag)
    with pytest.raises(FileExistsError):
        s3.write_object_if(f"{bucket}/x", b"3", tag=tag)
    assert s3.describe_object(f"{bucket}/x")[0] == other
    assert storage.read_bytes(f"{bucket}/x") == b"2"
