"""A Ray cluster of one node for tests, with ports, token and folder of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
TOKEN = "0123456789abcdef" * 4


@dataclass(frozen=True)
class RayHead:
    """A running head node."""

    address: str  # of the dashboard
    folder: Path  # of Ray's sessions
    env: dict[str, str]  # for commands that talk to it

    def run(self, *command: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env={**self.env, **env}, capture_output=True, text=True, timeout=timeout
        )

    def lumos(self, *args: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "jobs.cli", *args, timeout=timeout, **env)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def ray_head(auth_mode: str = "token", **variables: str) -> Iterator[RayHead]:
    """Start a head node; the variables are of its processes alone."""
    gcs, dashboard, agent, client = free_ports(4)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": auth_mode,
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    env.pop("PYTHONPATH", None)  # what a job imports must be what went along with it
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short path: the names of sockets have 107 bytes
    start = ["ray", "start", "--head", "--block", "--num-cpus=6", f"--temp-dir={folder}", f"--port={gcs}"]
    start += ["--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={client}"]
    start += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    start += ["--node-ip-address=127.0.0.1"]
    address = f"http://127.0.0.1:{dashboard}"
    own = {**env, **variables, "RAY_worker_niceness": "0"}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(start, cwd=folder, env=own, stdout=log, stderr=log) as head,
    ):
        try:
            _wait(address, head, folder / "log")
            yield RayHead(address, folder, {**env, "RAY_API_SERVER_ADDRESS": address})
        finally:
            _kill(head.pid)
            head.wait(timeout=60)
            shutil.rmtree(folder, ignore_errors=True)


def _kill(pid: int) -> None:
    """End a process and all below it at once; when told to end, Ray may take half a minute."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _wait(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    """Until the dashboard takes jobs, for which the agent of the node must be there too."""
    import httpx

    headers = {"Authorization": f"Bearer {TOKEN}"}
    for _ in range(240):
        try:
            if httpx.get(f"{address}/api/jobs/", headers=headers, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert head.poll() is None, log.read_text()
        time.sleep(0.5)
    raise AssertionError(log.read_text())
