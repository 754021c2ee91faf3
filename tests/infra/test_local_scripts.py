"""What `up` and `down` of the local cluster must leave alone, with an `ip` that only writes down what it is told."""

import os
import subprocess
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "infra" / "cluster" / "local"
IP = """#!/bin/sh
echo "$*" >>"$0.log"
case "$*" in
"link add lumos0 type bridge") exit 2 ;;
"netns list") echo "lumos-1 (id: 1)" ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    """Runs a script for a folder of state; gives the process and what `ip` was told."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"ip": IP, "unshare": "#!/bin/sh\n", "ray": "#!/bin/sh\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(state, script, *arguments):
        env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "LUMOS_LOCAL_STATE": str(state)}
        done = subprocess.run([LOCAL / script, *arguments], env=env, capture_output=True, text=True, timeout=60)
        log = tools / "ip.log"
        told = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return done, told

    return run


def test_another_cluster_on_this_machine_is_not_taken_away_by_a_second_up(call, tmp_path):
    done, told = call(tmp_path / "mine", "up", "2")
    assert done.returncode == 1
    assert "lumos0 is there: another cluster is up on this machine" in done.stderr
    assert "netns delete lumos-1" not in told
    assert not (tmp_path / "mine").exists()


def test_what_is_no_node_is_told_with_those_there_are(call, tmp_path):
    (tmp_path / "state").mkdir()
    done, told = call(tmp_path / "state", "node", "97", "kill")
    assert (done.returncode, done.stderr) == (1, "error: there is no node 97 among: 1\n")
    assert told == ["netns list"]
    done, told = call(tmp_path / "state", "node", "store", "start")
    assert (done.returncode, done.stderr) == (1, "error: store is no node's number, 1 to 99\n")
    assert not told


def test_down_deletes_the_files_of_a_cluster_only(call, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").touch()
    done, told = call(tmp_path / "precious", "down")
    assert done.returncode == 1
    assert "precious holds other files than a cluster's, which stay" in done.stderr
    assert (tmp_path / "precious" / "data").exists()
    assert not told
    (tmp_path / "precious" / "token").touch()
    done, told = call(tmp_path / "precious", "down")
    assert done.returncode == 0, done.stderr
    assert {"netns delete lumos-1", "link delete lumos0"} <= set(told)
    assert not (tmp_path / "precious").exists()
    assert call(tmp_path / "never", "down")[0].returncode == 0
