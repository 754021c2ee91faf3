"""The engine's optimizers."""

import subprocess
import sys


def test_muon_under_zero1_continues_exactly(tmp_path):
    """Two processes; what is asserted is in muon_resume.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.pipelines.training.muon_resume", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
