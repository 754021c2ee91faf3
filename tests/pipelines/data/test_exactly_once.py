"""Runs that are killed and continued end with the very files of a run that was left alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.data.curate import curate
from pipelines.data.snapshot import ledger
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.stage.log import last_run
from tests.pipelines.data.corpora import curate_config, published, write_corpus

# A run as another process with a Ray cluster of its own, so that anything in it can be killed.
_DRIVER = """
import sys
from pathlib import Path
from pipelines.data.curate import curate
from tests.pipelines.data.corpora import curate_config
curate(curate_config(*map(Path, sys.argv[1:4]), "resources.workers=2"))
"""


class Run:
    """A curation in a process of its own."""

    def __init__(self, corpus: Path, dataset: Path, tokenizer: Path, *, driver: str = _DRIVER) -> None:
        command = [sys.executable, "-c", driver, str(corpus), str(dataset), str(tokenizer)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def descendants(self) -> Iterator[tuple[int, str]]:
        """Process ids and command lines of all that the run started."""
        waiting = [self.process.pid]
        while waiting:
            try:
                for task in Path(f"/proc/{waiting.pop()}/task").iterdir():
                    for child in (task / "children").read_text().split():
                        waiting.append(int(child))
                        yield int(child), Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue

    def targets(self, kind: str) -> list[int]:
        """What can be killed: the driver, decode children, Ray workers that hold a stage or do a part of the rest."""
        if kind == "driver":
            return [self.process.pid] if self.process.poll() is None else []
        marks = {
            "worker": ("ray::MapWorker",),
            "child": ("decode_child",),
            "decision": ("ray::sign", "ray::find_pairs", "ray::link_pairs", "ray::choose_kept"),
            "publication": ("ray::deal_codes", "ray::write_bundle", "ray::write_ledger_part"),
        }[kind]
        return sorted(pid for pid, command in self.descendants() if any(mark in command for mark in marks))

    def kill(self, kind: str, *, when: Callable[[], bool], random_state: random.Random) -> bool:
        """SIGKILL one target once there is one and ``when`` holds; whether that came before the run's end."""
        while self.process.poll() is None:
            if when() and (found := self.targets(kind)):
                os.kill(random_state.choice(found), signal.SIGKILL)
                return True
            time.sleep(0.02)
        return False


def parts(dataset: Path, stage: str) -> int:
    return len(list((dataset / "stages").glob(f"{stage}/*/part-*.parquet")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "videos", good=24)


@pytest.fixture(scope="module")
def untouched(corpus, tokenizer_file, tmp_path_factory, ray_cluster):
    """Dataset and files of a run that nobody disturbed."""
    dataset = tmp_path_factory.mktemp("untouched") / "d"
    result = curate(curate_config(corpus, dataset, tokenizer_file))
    return {"dataset": dataset, "files": published(open_snapshot(result.snapshot_uri))}


def test_exactly_once_after_three_kills(corpus, tokenizer_file, untouched, tmp_path):
    dataset, chance = tmp_path / "d", random.Random(0)
    first = Run(corpus, dataset, tokenizer_file)
    assert first.kill("driver", when=lambda: parts(dataset, "split") > 1, random_state=chance)
    first.process.wait()
    committed = {path: path.stat().st_mtime_ns for path in (dataset / "stages").rglob("part-*.parquet")}
    assert committed
    second = Run(corpus, dataset, tokenizer_file)
    assert second.kill("child", when=lambda: True, random_state=chance)
    assert second.kill("worker", when=lambda: parts(dataset, "tokens") > 0, random_state=chance)
    assert second.process.wait(timeout=200) == 0
    assert published(open_snapshot(str(dataset))) == untouched["files"]
    assert {path: path.stat().st_mtime_ns for path in committed} == committed  # what was done was not done again


# Likewise, but with decisions and publication in many small pieces by Ray's workers, as of millions of clips.
_MANY_PIECES = """
from pipelines.data.snapshot import ledger, shards
from pipelines.data.stage import tasks
from pipelines.data.steps import duplicates
tasks._FEW_BYTES, duplicates._TASK_FRAMES, shards._TASK_BYTES, ledger._PART_ROWS = 0, 10, 1, 1
"""


@pytest.mark.slow
def test_exactly_once_after_kills_in_decisions_and_publication(
    corpus, tokenizer_file, untouched, ray_cluster, tmp_path, monkeypatch
):
    dataset, chance = tmp_path / "d", random.Random(0)
    options = ["publish.shard_mb=0.001", "near_duplicates=0.9999", "moving_duplicates.motion=null"]
    driver = _MANY_PIECES + _DRIVER.replace('"resources.workers=2"', f'"resources.workers=2", *{options}')
    config = curate_config(corpus, dataset, tokenizer_file, *options)
    monkeypatch.setattr(ledger, "_PART_ROWS", 1)
    shutil.copytree(untouched["dataset"] / "stages", dataset / "stages")
    expected = published(open_snapshot(curate(config).snapshot_uri))
    assert len(expected) > 50
    shutil.rmtree(dataset / "snapshots")

    def written(what: str) -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in dataset.glob(f"snapshots/*/{what}/**/*.parquet")}

    first = Run(corpus, dataset, tokenizer_file, driver=driver)
    assert first.kill("decision", when=lambda: True, random_state=chance)
    assert first.kill("publication", when=lambda: len(written("data")) > 1, random_state=chance)
    assert first.kill("driver", when=lambda: len(written("data")) > 5, random_state=chance)
    first.process.wait()
    before = written("data")
    second = Run(corpus, dataset, tokenizer_file, driver=driver)
    assert second.kill("publication", when=lambda: len(written("ledger")) > 1, random_state=chance)
    assert second.kill("driver", when=lambda: len(written("ledger")) > 5, random_state=chance)
    second.process.wait()
    assert not list(dataset.glob("snapshots/*/manifest.json"))
    before |= written("data") | written("ledger")
    third = Run(corpus, dataset, tokenizer_file, driver=driver)
    assert third.process.wait(timeout=200) == 0
    assert published(open_snapshot(str(dataset))) == expected
    after = written("data") | written("ledger")
    assert {path: after[path] for path in before} == before  # what was done was not done again
    assert len(after) > len(before)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_exactly_once_after_twenty_kills(corpus, tokenizer_file, untouched, tmp_path):
    dataset, chance = tmp_path / "d", random.Random(1)
    kills = {"driver": 0, "worker": 0, "child": 0}
    stages: Counter[str] = Counter()  # in which a kill came

    def wanted() -> bool:
        return sum(kills.values()) < 20 or min(kills.values()) < 5 or min(stages["split"], stages["tokens"]) < 5

    while wanted():
        if (dataset / "snapshots").exists():  # too quick: begin once more with less of what was done
            for path in sorted((dataset / "stages").rglob("part-*.parquet"))[::2]:
                path.unlink()
            for path in (dataset / "snapshots").glob("*/manifest.json"):
                path.unlink()
        run = Run(corpus, dataset, tokenizer_file)
        begin, patience = time.monotonic(), chance.uniform(5, 25)
        while run.process.poll() is None and wanted():
            time.sleep(chance.uniform(0.05, 1.0))
            found = {kind: targets for kind in kills if (targets := run.targets(kind))}
            if time.monotonic() - begin < patience:
                found.pop("driver", None)  # else hardly a run would get to its workers
            kind = min(found, key=kills.__getitem__, default=None)
            started = last_run(str(dataset))
            stage = list(started.stages)[-1] if started and started.stages else "start"
            if kind is None or kills[kind] > min(kills.values()) + 2 or stages[stage] >= 10:
                continue  # wait for what is rarer
            os.kill(chance.choice(found[kind]), signal.SIGKILL)
            kills[kind] += 1
            stages[stage] += 1
        run.process.wait()
    sys.stdout.write(f"kills {kills}, in stages {dict(stages)}\n")
    last = Run(corpus, dataset, tokenizer_file)
    assert last.process.wait(timeout=600) == 0
    files = published(open_snapshot(str(dataset)))
    assert {name: value for name, value in files.items() if name != "id"} == {
        name: value for name, value in untouched["files"].items() if name != "id"
    }
