"""`lumos submit` and `lumos jobs` against a real cluster that asks for a token."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.config import provenance
from pipelines.sample_corpus import write_corpus
from pipelines.submission.bundle import bundle
from pipelines.training.checkpoints import find_checkpoints
from tests.jobs.ray_head import ROOT, TOKEN, free_ports, ray_head
from tests.lumos.models import save_tiny_folder
from tests.pipelines.data.videos import moving_square, write_video

SECRET = "planted-4f9c1d7a-secret"
WITHOUT_TOKEN = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}


@pytest.fixture(scope="module")
def head():
    with ray_head(AWS_SECRET_ACCESS_KEY=SECRET, MLFLOW_TRACKING_PASSWORD=SECRET) as running:
        yield running


def files_with(folder: Path, text: str) -> list[str]:
    """Files below a folder that hold a text."""
    wanted, found = text.encode(), []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink() and wanted in path.read_bytes():
                found.append(str(path))
    return found


def jobs_as_json(head) -> list[dict]:
    return json.loads(head.lumos("jobs", "list", "--json").stdout)


def details(head, job_id: str) -> str:
    """Everything that Ray tells of a job to those who may ask."""
    import httpx

    headers = {"Authorization": f"Bearer {TOKEN}"}
    return "".join(
        httpx.get(f"{head.address}{path}", headers=headers, timeout=30).text
        for path in ("/api/jobs/", f"/api/jobs/{job_id}", f"/api/jobs/{job_id}/logs", "/api/v0/runtime_envs")
    )


@pytest.mark.timeout(240)
def test_a_verb_is_submitted_followed_and_found_again(head, tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a red square-0.mp4", moving_square(9))
    command = [sys.executable, "-m", "jobs.cli", "submit", "evaluate", "videos", "--gallery", "none", "--name", "first"]
    env = {**head.env, "PYTHONPATH": str(ROOT), "AWS_SECRET_ACCESS_KEY": SECRET}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    job_id, *log = done.stdout.splitlines()
    assert re.fullmatch(r"first-[0-9a-f]{8}", job_id)
    assert f"results: {tmp_path / 'videos'}-evaluation" in log  # a path counts from this command's folder
    assert f"job {job_id} succeeded after" in done.stderr
    evaluation = (tmp_path / "videos-evaluation" / "evaluation.json").read_text()
    assert f'"git_commit": "{provenance()["git_commit"]}"' in evaluation
    row = jobs_as_json(head)[0]
    assert (row["id"], row["name"], row["verb"], row["status"]) == (job_id, "first", "evaluate", "succeeded")
    told = details(head, job_id)
    assert "LUMOS_GIT_COMMIT" in told
    for text in (SECRET, TOKEN):
        assert text not in told
        assert not files_with(head.folder, text)
        assert not files_with(tmp_path, text)


@pytest.mark.timeout(120)
def test_what_is_wrong_is_told_with_status_2_and_no_upload(head, tmp_path):
    def refused(*args: str, **env: str) -> str:
        done = head.lumos("submit", *args, **env)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.count("\n") == 1 or done.stderr.startswith("Usage:")
        return done.stderr

    before = {row["id"] for row in jobs_as_json(head)}
    assert "refuses this token" in refused("demo", RAY_AUTH_TOKEN="f" * 64)
    assert "asks for a token, and there is none here" in refused("demo", **WITHOUT_TOKEN)
    assert "did you mean 'steps'?" in refused("train", "demo", "stepz=3", RAY_AUTH_TOKEN="f" * 64)  # before the cluster
    assert "nobody answers there" in refused("demo", "--address", "http://127.0.0.1:9")
    assert "looks like a secret" in refused("demo", "--env", f"AWS_SECRET_ACCESS_KEY={SECRET}")
    assert "has no job of that id or name" in head.lumos("jobs", "stop", "nosuch").stderr
    assert {row["id"] for row in jobs_as_json(head)} == before


def start(head, entrypoint: str) -> str:
    """A job of the cluster that is cheaper than a verb."""
    command = ["ray", "job", "submit", "--no-wait", "--address", head.address, "--", "sh", "-c", entrypoint]
    for _ in range(3):  # Ray's own command gives up where a busy dashboard does not answer
        done = head.run(*command)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    return re.search(r"raysubmit_\w+", done.stdout)[0]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_jobs_inherit_what_the_cluster_keeps_for_them(head):
    job_id = start(head, "echo length ${#AWS_SECRET_ACCESS_KEY}")
    followed = head.lumos("jobs", "logs", job_id, "--follow")
    assert f"\nlength {len(SECRET)}\n" in followed.stdout, followed.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_end_of_a_job_is_the_end_of_the_command(head):
    failed = start(head, "echo 'it broke'; exit 3")
    followed = head.lumos("jobs", "logs", failed, "--follow")
    assert followed.returncode == 1
    assert "it broke" in followed.stdout
    assert f"error: job {failed} failed after" in followed.stderr
    assert "exit status 3" in followed.stderr
    assert "it broke" in head.lumos("jobs", "logs", failed).stdout

    stopped = start(head, "echo begun; exec sleep 600")
    done = head.lumos("jobs", "stop", stopped)
    assert (done.returncode, done.stdout.startswith(f"job {stopped} stopped after")) == (0, True)
    followed = head.lumos("jobs", "logs", stopped, "--follow")
    assert (followed.returncode, f"job {stopped} stopped" in followed.stderr) == (1, True)
    again = head.lumos("jobs", "stop", stopped)
    assert again.stdout.startswith(f"job {stopped} stopped after")
    listed = head.lumos("jobs", "list").stdout
    assert re.search(rf"{failed} .* failed ", listed)


def interrupted(head, job_id: str, answer: bytes | None) -> tuple[int, str]:
    """Exit status and output of following a job that Ctrl-C interrupts, with the answer given on a terminal."""
    command = [sys.executable, "-m", "jobs.cli", "jobs", "logs", job_id, "--follow"]
    ours, theirs = pty.openpty()
    stdin = subprocess.DEVNULL if answer is None else theirs
    with subprocess.Popen(command, cwd=ROOT, env=head.env, stdin=stdin, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"begun" not in shown:
            shown += os.read(ours, 1000)
        process.send_signal(signal.SIGINT)
        if answer is not None:
            while b"Stop job" not in shown:
                shown += os.read(ours, 1000)
            os.write(ours, answer)
        with contextlib.suppress(OSError):  # its other end is closed
            while piece := os.read(ours, 1000):
                shown += piece
        process.wait(timeout=60)
    os.close(ours)
    return process.returncode, shown.decode()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_leaves_the_job_unless_a_person_says_stop(head):
    job_id = start(head, "echo begun; exec sleep 600")
    for answer in (None, b"\n"):
        status, shown = interrupted(head, job_id, answer)
        assert status == 130, shown
        assert f"lumos jobs stop {job_id}" in shown
        assert {row["id"]: row["status"] for row in jobs_as_json(head)}[job_id] == "running"
    status, shown = interrupted(head, job_id, b"y\n")
    assert status == 1, shown
    assert f"job {job_id} stopped" in shown


class Forwarder:
    """A port before another, as of `kubectl port-forward`, whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self.target, self.open, self.pairs = port, True, []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            self.pairs.append((near, far))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self, seconds: float) -> None:
        self.open = False
        for pair in self.pairs:
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self.open = True


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_dropped_connection_is_taken_up_where_it_broke(head, tmp_path):
    forwarder = Forwarder(int(head.address.rpartition(":")[2]))
    job_id = start(head, "for i in $(seq 40); do echo line $i; sleep 0.4; done")
    command = [sys.executable, "-m", "jobs.cli", "jobs", "logs", job_id, "--follow"]
    command += ["--address", f"http://127.0.0.1:{forwarder.port}"]
    told = tmp_path / "told"
    pipes = {"stdout": subprocess.PIPE, "text": True}
    with told.open("w") as stderr, subprocess.Popen(command, cwd=ROOT, env=head.env, stderr=stderr, **pipes) as process:
        for line in process.stdout:
            if line == "line 3\n":
                break
        for _ in range(2):
            forwarder.cut(2)
            time.sleep(3)
        rest = process.stdout.read()  # as communicate() would not, with what was read ahead above
    errors = told.read_text()
    forwarder.server.close()
    assert process.returncode == 0, errors
    assert [line for line in rest.splitlines() if line.startswith("line")] == [f"line {i}" for i in range(4, 41)]
    assert "the connection to the dashboard dropped" in errors
    assert "the dashboard answers again" in errors


@pytest.fixture(scope="module")
def dataset(head, tmp_path_factory):
    """What a curation as a job has published."""
    folder = tmp_path_factory.mktemp("curated")
    write_corpus(folder / "corpus", 0, 12)
    done = head.lumos("submit", "curate", "demo", f"source.path={folder / 'corpus'}", f"dataset={folder / 'dataset'}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"snapshot {folder / 'dataset'}" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("split: ")]) < 30  # of its bar
    return folder / "dataset"


def training(dataset: Path, output: Path) -> list[str]:
    given = ["train", "demo", f"data.dataset={dataset}", f"output={output}", "optimizer.warmup_steps=1"]
    return [*given, "global_batch=4", "micro_batch_tokens=512", "validation.every=0", "sampling_choice=null"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_as_a_job_leaves_no_secret_anywhere(head, dataset, tmp_path):
    given = [*training(dataset, tmp_path / "train"), "steps=4", "--env", "AWS_REGION=nowhere-1"]
    trained = head.lumos("submit", *given, AWS_SECRET_ACCESS_KEY=SECRET)
    assert trained.returncode == 0, trained.stdout[-4000:] + trained.stderr[-4000:]
    assert (tmp_path / "train" / "export").is_dir()
    told = details(head, trained.stdout.split()[0])
    assert "nowhere-1" in told
    with contextlib.closing(sqlite3.connect(tmp_path / "mlruns.db")) as database:
        record = "\n".join(database.iterdump())
    assert provenance()["git_commit"] in record
    for text in (SECRET, TOKEN):
        assert text not in told
        assert text not in record
        assert not files_with(head.folder, text)
        assert not files_with(tmp_path, text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_is_stopped_saves_a_checkpoint_first(head, dataset, tmp_path):
    given = [*training(dataset, tmp_path / "train"), "steps=5000", "checkpoint.every=5000", "--name", "long"]
    begun = head.lumos("submit", *given, "--no-wait")
    assert begun.returncode == 0, begun.stderr
    while "step 1/5000" not in (shown := head.lumos("jobs", "logs", "long").stdout):
        assert jobs_as_json(head)[0]["status"] in ("pending", "running"), shown
    stopped = head.lumos("jobs", "stop", "long")
    assert "stopped after" in stopped.stdout, stopped.stderr
    saved = head.lumos("jobs", "logs", "long").stdout
    (checkpoint,) = find_checkpoints(str(tmp_path / "train" / "checkpoints"))
    assert 1 <= checkpoint.state.step < 5000, saved[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_service_is_a_job_that_runs_until_it_is_stopped(head, tmp_path):
    import httpx

    save_tiny_folder(tmp_path / "model")
    (port,) = free_ports(1)
    given = ["serve", "--model", str(tmp_path / "model"), "--port", str(port), "--jobs", str(tmp_path / "jobs")]
    assert head.lumos("submit", *given, "--no-wait", "--name", "service").returncode == 0
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                break
        assert jobs_as_json(head)[0]["status"] in ("pending", "running"), head.lumos("jobs", "logs", "service").stdout
        time.sleep(1)
    # What the proxy is handed is found in the job's code.
    ill_formed = httpx.get(f"http://127.0.0.1:{port}/health", headers=[(b"x-request-id", b"\xe9")], timeout=5)
    assert (ill_formed.status_code, len(ill_formed.headers["x-request-id"])) == (200, 16)
    assert "stopped after" in head.lumos("jobs", "stop", "service").stdout
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_installed_code_runs_where_it_is_the_same_and_is_refused_where_not(tmp_path):
    write_corpus(tmp_path / "corpus", 0, 2)
    given = ["curate", "demo", f"source.path={tmp_path / 'corpus'}", f"dataset={tmp_path / 'dataset'}"]
    with ray_head(PYTHONPATH=str(ROOT)) as head, bundle("upload", {}) as another:
        done = head.lumos("submit", *given, "--project", "installed")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert len(list((tmp_path / "dataset").glob("snapshots/*/manifest.json"))) == 1
        command = [sys.executable, "-m", "jobs.cli", "submit", *given, "--project", "installed"]
        env = {**head.env, "LUMOS_GIT_COMMIT": "0123456789abcdef"}
        done = subprocess.run(command, cwd=another, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "error: the job was checked with lumos-ray" in done.stdout
    assert "exit status 2" in done.stderr
