"""The verbs as jobs on a cluster that was there before, with and without a token."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(params=["disabled", "token"])
def submit(request):
    """A function that submits `python ARGS` to a cluster of its own and waits for the job to end."""
    gcs, dashboard, agent, client = free_ports(4)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": request.param,
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short path: the names of sockets have 107 bytes
    start = ["ray", "start", "--head", "--block", "--num-cpus=6", f"--temp-dir={folder}", f"--port={gcs}"]
    start += ["--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={client}"]
    start += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    address = f"http://127.0.0.1:{dashboard}"

    def run(*args: str) -> None:
        command = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", "python", *args]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    with (folder / "log").open("w") as log, subprocess.Popen(start, env=env, stdout=log, stderr=log) as head:
        try:
            for _ in range(120):
                listed = subprocess.run(["ray", "job", "list", "--address", address], env=env, capture_output=True)
                if listed.returncode == 0:
                    break
                assert head.poll() is None, (folder / "log").read_text()
                time.sleep(1)
            yield run
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_curate_train_generate_as_ray_jobs(submit, tmp_path):
    from pipelines.sample_corpus import write_corpus

    write_corpus(tmp_path / "corpus", 0, 24)
    submit("jobs/curate.py", "demo", f"source.path={tmp_path / 'corpus'}", f"dataset={tmp_path / 'dataset'}")
    train = ["data.dataset=" + str(tmp_path / "dataset"), f"output={tmp_path / 'train'}"]
    submit(
        "jobs/train.py",
        "demo",
        *train,
        "steps=4",
        "optimizer.warmup_steps=1",
        "global_batch=4",
        "micro_batch_tokens=512",
    )
    model = tmp_path / "train" / "export"
    generate = ["--model", str(model), "--prompt", "a red square moves left", "--out", str(tmp_path / "videos")]
    submit("jobs/generate.py", *generate, "sampling.num_steps=2")
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
