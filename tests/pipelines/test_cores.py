import os

from pipelines import cores
from pipelines.cores import usable_cores


def test_a_containers_share_of_time_counts_as_cores(tmp_path, monkeypatch):
    groups, own = tmp_path / "cgroup", tmp_path / "self"
    monkeypatch.setattr(cores, "_GROUPS", groups)
    monkeypatch.setattr(cores, "_OWN", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert usable_cores() == 64, "a system without control groups"
    (groups / "slice" / "job").mkdir(parents=True)
    own.write_text("4:memory:/\n0::/slice/job\n")
    (groups / "slice" / "job" / "cpu.max").write_text("max 100000\n")
    assert usable_cores() == 64
    (groups / "slice" / "cpu.max").write_text("250000 100000\n")  # of the group above
    assert usable_cores() == 2
    (groups / "slice" / "job" / "cpu.max").write_text("50000 100000\n")
    assert usable_cores() == 1
    (groups / "cpu").mkdir()  # version 1, and the host's path of a container
    own.write_text("3:cpu,cpuacct:/docker/1234\n0::/\n")
    (groups / "cpu" / "cpu.cfs_quota_us").write_text("800000\n")
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == 8
    (groups / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores() == 64
