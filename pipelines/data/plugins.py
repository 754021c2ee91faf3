"""What others add without changing this project: scores and captioners, from modules that the environment names.

``LUMOS_SCORES`` and ``LUMOS_CAPTIONERS`` hold names of importable modules, separated by commas; each module offers a
tuple ``SCORES`` (of ``scores.Score``) or ``CAPTIONERS`` (of ``captions.captioner.Captioner``). Workers and decode
children read the same variables, so on a cluster they belong in the job's runtime environment, and the modules in its
working directory.
"""

import importlib
import os
from typing import Any

from pipelines.errors import UserError


def offered(name: str) -> tuple[Any, ...]:
    """All that plugins offer under a name, SCORES or CAPTIONERS, in their order; a ``UserError`` if one does not."""
    variable, found = f"LUMOS_{name}", list[Any]()
    for module in filter(None, map(str.strip, os.environ.get(variable, "").split(","))):
        try:
            found += getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{variable} names {module}, from which {name} cannot be imported: {error}") from error
    return tuple(found)
