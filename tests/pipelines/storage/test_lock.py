import os
import subprocess
import sys

import pytest

from pipelines.errors import UserError
from pipelines.storage.lock import LOCK_FILE, check_lock, dataset_lock, unlock

HOLD = """
import sys, time
from pipelines.storage.lock import dataset_lock
with dataset_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_one_process_holds_a_folder_and_a_kill_frees_it_at_once(tmp_path, holder):
    message = rf"{tmp_path} is in use by another run \(pid {holder.pid} on \S+ since 20\S+: -c {tmp_path}\)"
    for _ in range(2):  # who is refused leaves no trace
        with pytest.raises(UserError, match=message), dataset_lock(str(tmp_path)):
            pass
    with pytest.raises(UserError, match=message):
        unlock(str(tmp_path), force=True)
    holder.kill()
    holder.wait()
    with dataset_lock(str(tmp_path)):
        check_lock(str(tmp_path))
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()


def test_a_folder_is_free_after_the_block_however_it_ends(tmp_path):
    folder = str(tmp_path / "new")
    with pytest.raises(KeyError), dataset_lock(folder):
        raise KeyError
    with dataset_lock(folder), pytest.raises(UserError, match=f"pid {os.getpid()} "), dataset_lock(folder):
        pass
    assert unlock(folder) == f"{folder} is not locked"


def test_what_cannot_be_locked_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refused = pytest.raises(UserError, match=r"file cannot be written to .*name another folder")
    with refused, dataset_lock(str(tmp_path / "file")):
        pass
    assert unlock(str(tmp_path / "nothing")).endswith("is not locked")
    assert not (tmp_path / "nothing").exists()
