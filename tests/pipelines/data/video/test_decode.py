import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.settings import DecodeConfig, SplitConfig
from pipelines.data.video.decode import CrashLog, DecodeChild, DecodeJob
from pipelines.data.video.reader import ClipRequest, DecodedSource
from pipelines.decoding.errors import VideoError
from tests.pipelines.data.videos import moving_square, write_video


def job(path, key=None):
    return DecodeJob(key or Path(path).name, "split", {"path": str(path), "config": SplitConfig()})


@pytest.fixture
def start(tmp_path):
    children = []

    def make(**config):
        children.append(DecodeChild(DecodeConfig(**config), CrashLog(str(tmp_path / "crashes"))))
        return children[-1]

    yield make
    for child in children:
        child.close()


@pytest.fixture
def hanging(tmp_path):
    """A pipe that nobody writes to: whoever opens it hangs."""
    path = tmp_path / "hangs.mp4"
    os.mkfifo(path)
    return path


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "good.mp4", moving_square(24))


def crashes(tmp_path):
    return [json.loads(path.read_text())["causes"] for path in (tmp_path / "crashes").glob("*.json")]


def test_results_come_in_order_and_errors_among_them(tmp_path, start, video):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    passed = VideoError("missing_file", "known before")
    jobs = [job(video, "a"), job(tmp_path / "text.mp4"), passed, job(video, "b"), job(tmp_path / "gone.mp4")]
    results = list(start().run(iter(jobs)))
    assert [getattr(result, "code", "ok") for result in results] == [
        "ok",
        "not_a_video",
        "missing_file",
        "ok",
        "missing_file",
    ]
    assert isinstance(results[0], DecodedSource)
    assert crashes(tmp_path) == []


def test_frames_travel(start, video):
    request = ClipRequest(
        path=str(video), start_s=0, end_s=2, fps=12, num_frames=9, width=32, height=32, source_frames=24
    )
    [frames] = start().run([DecodeJob("k", "clip", {"request": request})])
    assert frames.shape == (9, 32, 32, 3)
    assert frames.dtype == np.uint8


def test_a_run_left_half_way_hands_none_of_its_results_to_the_next(tmp_path, start):
    lengths = (12, 16, 20, 24)
    videos = [write_video(tmp_path / f"{frames}.mp4", moving_square(frames)) for frames in lengths]
    child = start()
    first = child.run([job(path) for path in videos[:3]])
    assert next(first).source_frames == 12  # the next is in the child's pipe already
    [last] = child.run([job(videos[3])])
    assert last.source_frames == 24


def test_a_hanging_decoder_is_given_up_after_three_tries_and_others_go_on(tmp_path, start, hanging, video):
    child = start(stall_seconds=1.0)
    first, second, third = child.run([job(video, "a"), job(hanging), job(video, "b")])
    assert isinstance(first, DecodedSource)
    assert isinstance(third, DecodedSource)
    assert (second.code, second.transient) == ("decoder_hangs", True)
    assert crashes(tmp_path) == [["stalled"] * 3]
    # Another run, another child: the count is durable, and nothing hangs any more.
    begin = time.monotonic()
    [again] = start(stall_seconds=60.0).run([job(hanging)])
    assert again.args == second.args
    assert time.monotonic() - begin < 30


def test_a_killed_child_is_replaced_and_only_the_third_kill_counts_against_the_file(tmp_path, start, hanging, video):
    child = start(stall_seconds=60.0)
    results = child.run([job(hanging), job(video)])

    def kill_three_times():
        killed = set()
        while len(killed) < 3:
            process = child._process
            if process is not None and process.pid not in killed and child._sent:
                time.sleep(0.2)
                os.kill(process.pid, signal.SIGKILL)
                killed.add(process.pid)
            time.sleep(0.05)

    killer = threading.Thread(target=kill_three_times)
    killer.start()
    failed = next(results)
    killer.join()
    assert (failed.code, failed.transient) == ("decoder_crashes", True)
    assert isinstance(next(results), DecodedSource)
    assert crashes(tmp_path) == [["SIGKILL"] * 3]


def test_a_child_killed_once_leaves_no_trace_in_the_results(tmp_path, start, video):
    jobs = [job(video, str(index)) for index in range(6)]
    untouched = list(start().run(jobs))
    child = start()
    results = []
    for result in child.run(jobs):
        results.append(result)
        if len(results) == 2:
            os.kill(child._process.pid, signal.SIGKILL)
    assert results == untouched
    assert crashes(tmp_path) in ([], [["SIGKILL"]])


def test_memory_is_bounded(start, video):
    request = {"path": str(video), "start_s": 0, "end_s": 2, "fps": 60, "num_frames": 97, "source_frames": 24}
    wanted = DecodeJob("k", "clip", {"request": ClipRequest(**request, width=1920, height=1080)})  # 600 MB of frames
    child = start(memory_mb=256)
    failed, decoded = child.run([wanted, job(video)])
    assert (failed.code, failed.transient) == ("memory", False)
    assert isinstance(decoded, DecodedSource)


def test_children_are_recycled(start, video):
    child = start(recycle_after=2)
    processes = []
    for _ in child.run([job(video, str(index)) for index in range(5)]):
        processes.append(child._process.pid)
    assert len(set(processes)) == 3


def test_a_child_ends_with_its_worker(tmp_path, hanging):
    import subprocess
    import sys

    code = f"""
from pathlib import Path
from pipelines.data.video.decode import CrashLog, DecodeChild, DecodeJob
from pipelines.data.settings import DecodeConfig, SplitConfig
child = DecodeChild(DecodeConfig(), CrashLog({str(tmp_path / "crashes")!r}))
import threading
def tell():
    import time
    while not child._sent: time.sleep(0.05)
    print(child._process.pid, flush=True)
threading.Thread(target=tell).start()
list(child.run([DecodeJob("k", "split", {{"path": {str(hanging)!r}, "config": SplitConfig()}})]))
"""
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
