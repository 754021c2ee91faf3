"""What others add without changing this project: scores and captioners, from modules named in ``LUMOS_PLUGINS``.

The variable holds names of importable modules, separated by commas. A module offers tuples called ``SCORES``
(``scores.Score``) or ``CAPTIONERS`` (``captions.registry.Captioner``). Workers and decode children read the same
variable, so on a cluster it belongs in the job's runtime environment, and the modules in its working directory.
"""

import importlib
import os
from typing import Any

from pipelines.errors import UserError

VARIABLE = "LUMOS_PLUGINS"


def offered(name: str) -> tuple[Any, ...]:
    """All that the plugins offer under a name, in their order.

    Raises:
        UserError: if one cannot be imported.
    """
    found: list[Any] = []
    for module in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        try:
            found += getattr(importlib.import_module(module), name, ())
        except ImportError as error:
            raise UserError(f"{VARIABLE} names {module}, which cannot be imported ({error})") from error
    return tuple(found)
