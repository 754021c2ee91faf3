"""Killing what a training consists of, once it has come to something."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipelines.config import config_to_yaml
from pipelines.training.config import TrainConfig


def when(condition: Callable[[], object], action: Callable[[], object]) -> threading.Thread:
    """Do something as soon as it is so."""

    def wait() -> None:
        while not condition():
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_a_worker() -> None:
    """Kill one of the training processes of this process's cluster."""
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    workers[-1].kill()


def kill_driver(config: TrainConfig, file: Path, reached: Callable[[], object]) -> None:
    """Begin a run in a process of its own, and kill that once it has come to something."""
    file.write_text(config_to_yaml(config))
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs.train", str(file)]
    log = file.with_suffix(".log")
    with log.open("w") as said, subprocess.Popen(command, env=env, stdout=said, stderr=said) as driver:
        try:
            when(reached, driver.kill)
            assert driver.wait(timeout=240) == -signal.SIGKILL, log.read_text()[-3000:]
        finally:
            driver.kill()
