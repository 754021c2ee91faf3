"""Memory of a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from pipelines.config import PROJECT_DIR

_CODE = "import importlib, json, sys; m, f, a = sys.argv[1:]; getattr(importlib.import_module(m), f)(**json.loads(a))"


def peak_rss_gb(module: str, function: str, arguments: dict[str, Any]) -> float:
    """Peak of memory (1e9 bytes) of a process that does nothing but call a function, as the system tells its parent.

    Raises:
        RuntimeError: if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_DIR)}
    command = [sys.executable, "-c", _CODE, module, function, json.dumps(arguments)]
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the process whose memory was to be measured ended with {process.returncode}")
    return usage.ru_maxrss * 1024 / 1e9
