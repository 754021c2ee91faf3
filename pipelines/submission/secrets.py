"""What may be told to a job: Ray shows a job's command and variables in clear, and keeps its files.

``GET /api/jobs/`` answers everybody who has the cluster's token with a job's ``runtime_env``, its variables included
(Ray 2.60 leaves them out for browsers alone), and the nodes' logs repeat it. So nothing secret goes with a job: secrets
stand in the environment of the cluster's own processes, which jobs inherit and which is neither shown nor logged.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.errors import UserError

# Modules that add keys to a curation's config: what it means depends on them, so that they go with it. Nothing else
# goes unasked: this machine's region or endpoint, with the cluster's own keys, would send these keys to another store.
CARRIED = ("LUMOS_CAPTIONERS", "LUMOS_SCORES")

_WORDS = {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "PWD", "CREDENTIAL", "CREDENTIALS"}
_NO_SECRETS = {"PWD", "OLDPWD"}
_VALUES = re.compile(
    r"://[^/@\s:]*:[^/@\s]+@|https?://[^/@\s]+@"  # a URL with a password, or with a token in its place
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\b(?:sk-|hf_|ghp_|github_pat_|glpat-|xox[abp]-)[\w-]{16,}"
    r"|\bBearer\s+[\w.~+/-]{16,}"  # no word of a prompt is as long
    r"|[?&](?i:x-amz-signature|x-amz-security-token|signature|sig|access_token|token|api_?key)=[^&\s]"  # a signed URL
)
_INSTEAD = (
    "Ray shows and logs in clear what goes with a job, so set it in the environment of the cluster's own processes "
    "(a Kubernetes Secret, or before `ray start`), which jobs inherit"
)


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable or key of that name, or its value, is one that others must not see."""
    words = name.upper().replace("-", "_").split("_")
    named = not _WORDS.isdisjoint(words) and words[-1] != "ENV" and name.upper() not in _NO_SECRETS
    return named or _VALUES.search(value) is not None


def carried_variables(given: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job gets: those of ``CARRIED`` that are set, and those given as ``NAME`` or ``NAME=VALUE``.

    Raises:
        UserError: for one that is not set, that Ray sets itself, or that looks secret (its value is not repeated).
    """
    variables = {name: environment[name] for name in CARRIED if environment.get(name)}
    for item in given:
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"--env {name}: expected NAME, to carry a variable that is set here, or NAME=VALUE")
        if name in ("LUMOS_GIT_COMMIT", "PATH", "PYTHONPATH") or name.startswith("RAY_"):
            raise UserError(f"--env {name}: the cluster sets it itself; leave it out")
        if not equals and name not in environment:
            raise UserError(f"--env {name}: it is not set here; set it, or give {name}=VALUE")
        variables[name] = value if equals else environment[name]
    for name, value in variables.items():
        if looks_secret(name, value):
            raise UserError(f"--env {name}: it looks like a secret; {_INSTEAD}")
    return variables


def refuse_secrets(values: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Find secrets in a config (as plain values) or on a command line; a ``UserError`` names the key alone."""
    for key, value in leaves(values):
        if isinstance(value, str) and value and any(looks_secret(part, value) for part in key.split(".")):
            raise UserError(f"{key}: it holds a secret; {_INSTEAD}, and leave it out here")
    for index, argument in enumerate(arguments):
        if _VALUES.search(argument):
            before = (
                arguments[index - 1] if index and arguments[index - 1].startswith("--") else f"argument {index + 1}"
            )
            raise UserError(f"{before}: it holds a secret; {_INSTEAD}")


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings and lists with its dotted key."""
    if isinstance(values, Mapping):
        items: Iterator[tuple[Any, Any]] = iter(values.items())
    elif isinstance(values, list | tuple):
        items = enumerate(values)
    else:
        yield prefix, values
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
