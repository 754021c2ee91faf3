"""Strict YAML configuration: one complete file per run, checked key by key before anything expensive begins.

Run configs are stdlib frozen dataclasses beside their owners. Each names the folder of its shipped files in ``KIND``
and checks its own ranges in ``__post_init__`` with ``ValueError``.
"""

import difflib
import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from pipelines.errors import UserError

PROJECT_DIR = Path(__file__).resolve().parent.parent
CONFIG_DIR = PROJECT_DIR / "infra" / "configs"

EXPECTED = "LUMOS_EXPECTED"  # variable of a job that runs the installed code: "VERSION COMMIT" of who submitted it

_STOOD_IN = "(missing)"  # for a key that is missing, to look at the others
_MISSING = ("missing", "missing_keyword_only_argument", "missing_argument")  # kinds of pydantic's errors

COMPLETE = "complete"  # object of a command's context: the config that it prints must miss nothing

# What decides the bytes of an output, and so belongs in its provenance.
_PACKAGES = ("av", "decord", "deepspeed", "mlflow", "numpy", "pyarrow", "ray", "safetensors", "tokenizers", "torch")


class RunConfig(Protocol):
    """A dataclass that describes one run."""

    # Folder of infra/configs that holds its shipped files. If there, REMOVED: old keys, remedies; ALSO_CALLED:
    # names that others give to keys, and ours; REMEDIES: how keys are given, for who leaves them out.
    KIND: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


ConfigT = TypeVar("ConfigT", bound=RunConfig)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What a run may take for granted of a cluster of several machines; of one machine nothing of it matters."""

    shared_paths: bool = False  # local paths are folders that all of them share; else paths must be s3:// URIs
    autoscaling: bool = (
        False  # machines are added for what waits; else a training that the cluster is too small for ends
    )


def load_config(cls: type[ConfigT], source: str, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a run's config.

    Args:
        cls: the dataclass to fill.
        source: path of a YAML file, or the name of one shipped with the package.
        overrides: ``key.path=value``, applied in order over the file; a value is parsed as YAML.

    Raises:
        UserError: for a missing or malformed file, an unknown or duplicate key, a wrong type or a value out of range;
            the message names file, key and value.
    """
    path, raw = _read(cls, source, overrides)
    try:
        return _filled(cls, raw)
    except ValidationError as error:
        details = error.errors()
    raise _as_user_error(cls, path, raw, overrides, details)


def show_config(cls: type[ConfigT], source: str, overrides: Sequence[str] = (), *, complete: bool = False) -> str:
    """A config as ``config_to_yaml`` writes it; keys that are missing stay so, and are named in comments.

    Raises:
        UserError: as ``load_config`` does, for missing keys only if it must be complete.
    """
    path, raw = _read(cls, source, overrides)
    try:
        return config_to_yaml(_filled(cls, raw))
    except ValidationError as error:
        details = error.errors()
    missing = [_key_path(raw, detail) for detail in details if detail["type"] in _MISSING]
    of_tuples = any(keys[-1].isdecimal() for keys in missing)  # too short, which is an error
    if complete or of_tuples or len(missing) < len(details):
        raise _as_user_error(cls, path, raw, overrides, details)
    stood_in = json.loads(json.dumps(raw))
    for keys in missing:
        _holder(stood_in, keys)[keys[-1]] = _STOOD_IN
    try:
        plain = config_to_dict(_filled(cls, stood_in))
    except ValidationError as error:  # of what stood behind the missing keys, or as one of these is no text
        others = [
            each for each in error.errors() if _key_path(raw, each) not in missing and _STOOD_IN not in each["msg"]
        ]
        raise _as_user_error(cls, path, raw, overrides, [*others, *details]) from None
    for keys in missing:
        del _holder(plain, keys)[keys[-1]]
    lines = [f"# {'.'.join(keys)}: missing, and has no default\n" for keys in missing]
    return "".join(lines) + _to_yaml(plain)


def _holder(values: Any, keys: Sequence[str]) -> Any:
    """What holds the last of some keys."""
    for key in keys[:-1]:
        values = values[int(key) if isinstance(values, list) else key]
    return values


def _read(cls: type[RunConfig], source: str, overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Where a config is, and what stands there, with overrides."""
    path = find_config(cls.KIND, source)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config {path}: {error}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"config {path}: expected a mapping of keys to values, found {_show(raw)}")
    for override in overrides:
        _apply_override(raw, override)
    for key, number in _numbers(raw):
        if not math.isfinite(number):
            raise UserError(f"config {path}: {key}: {_show(number)} is no finite number")
    return path, raw


def _numbers(values: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Keys and values of all that is a float."""
    if isinstance(values, float):
        yield prefix, values
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from _numbers(value, f"{prefix}.{key}" if prefix else str(key))


def _filled(cls: type[ConfigT], raw: dict[str, Any]) -> ConfigT:
    # JSON mode is strict about scalars yet reads lists into tuples and text into paths.
    return TypeAdapter(cls).validate_json(json.dumps(raw), strict=True, extra="forbid")


def _as_user_error(
    cls: type[RunConfig], path: Path, raw: dict[str, Any], overrides: Sequence[str], details: Sequence[ErrorDetails]
) -> UserError:
    lines = list(dict.fromkeys(_describe(cls, raw, detail) for detail in details))
    changed = ", ".join(override.partition("=")[0].strip() for override in overrides)
    where = f"config {path}" + (f" with overrides of {changed}" if changed else "")
    return UserError(f"{where}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{where}:", *lines]))


def find_config(kind: str, source: str) -> Path:
    """The file that ``source`` names: a path as it is, or a shipped config of that kind.

    Raises:
        UserError: if there is none; the message lists the shipped names.
    """
    path = Path(source)
    if path.is_file():
        return path
    shipped = CONFIG_DIR / kind / f"{source}.yaml"
    if re.fullmatch(r"[\w.-]+", source) and shipped.is_file():
        return shipped
    names = shipped_configs(kind)
    close = difflib.get_close_matches(source, names, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else "check the path"
    if path.is_dir():
        remedy = "it is a folder: name a YAML file"
    elif "=" in source:
        remedy = "the config comes before KEY=VALUE"
    raise UserError(
        f"config {source!r} is neither a file nor a shipped {kind} config ({', '.join(names) or 'none'}); {remedy}"
    )


def shipped_configs(kind: str) -> list[str]:
    """Names of the configs of one kind that come with the package, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.yaml"))


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values (tuples become lists, paths become text)."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain


def config_to_yaml(config: Any) -> str:
    """A config as YAML that ``load_config`` reads back to an equal one."""
    return _to_yaml(config_to_dict(config))


def _to_yaml(plain: dict[str, Any]) -> str:
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: Any) -> str:
    """16 hex digits that name a config (a dataclass or JSON-able values), whatever the order of its keys.

    Raises:
        TypeError: if something in it has no JSON form.
    """
    plain = config_to_dict(config) if is_dataclass(config) else config
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """What made an output: the git commit, and the versions of lumos and its main packages.

    The commit is that of the checkout, ending in "-dirty" where tracked files differ from it; outside a checkout (a
    wheel, the working directory of a Ray job) it is what ``LUMOS_GIT_COMMIT`` says, else "unknown".
    """
    versions = {name: _version(name) for name in _PACKAGES}
    return {"lumos": _version("lumos-ray"), "git_commit": _git_commit(), "packages": versions}


def check_expected() -> None:
    """Refuse, in a job, an installed lumos that is not the one it was checked with (``LUMOS_EXPECTED``).

    Commits are compared where both sides know theirs.

    Raises:
        UserError: if version or commit differ.
    """
    version, _, commit = os.environ.get(EXPECTED, "").partition(" ")
    here = (_version("lumos-ray"), _git_commit())
    known = "unknown" not in (commit or "unknown", here[1])
    if version and (version != here[0] or (known and commit != here[1])):
        raise UserError(
            f"the job was checked with lumos-ray {version} (commit {commit or 'unknown'}), the cluster has "
            f"{here[0]} (commit {here[1]}): submit it with --project upload, or install the same on both sides"
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _git_commit() -> str:
    if not (PROJECT_DIR / ".git").exists():  # installed: a repository further up would be somebody else's
        return os.environ.get("LUMOS_GIT_COMMIT", "unknown")
    command = ["git", "-C", str(PROJECT_DIR), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class _StrictLoader(yaml.SafeLoader):
    """YAML without its surprises: ``no`` and ``1:30`` stay text, ``1e-4`` is a number, a key may occur only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))  # PyYAML would read a leading zero as octal


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``key.path=value`` in place."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r}: expected key.path=value, for example optimizer.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML ({error}); put text in quotes") from error
    holder: Any = raw
    for depth, key in enumerate(keys, start=1):
        where = ".".join(keys[: depth - 1])
        index: Any = key
        if isinstance(holder, list):
            if not key.isdecimal() or int(key) >= len(holder):
                raise UserError(f"override {override!r}: {where} has items 0 to {len(holder) - 1}, not {key!r}")
            index = int(key)
        elif not isinstance(holder, dict):
            raise UserError(f"override {override!r}: {where} is {_show(holder)}, it has no keys of its own")
        if depth == len(keys):
            holder[index] = value
            return
        if isinstance(holder, dict) and holder.get(key) is None:
            holder[key] = {}
        holder = holder[index]


def _describe(cls: type[Any], raw: Any, detail: ErrorDetails) -> str:
    """One error of pydantic in our words: key, what is wrong, value."""
    keys = _key_path(raw, detail)
    name = ".".join(keys)
    kind, message, value = detail["type"], detail["msg"], detail["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        if name in getattr(cls, "REMOVED", {}):
            return f"key {name!r} is no more: {cls.REMOVED[name]}"
        siblings = _field_names(cls, keys[:-1])
        known_as = getattr(cls, "ALSO_CALLED", {}).get(name)
        close = known_as or _close_key(cls, keys, value, siblings)
        remedy = f"did you mean {close!r}?" if close else f"known here: {', '.join(siblings)}"
        return f"unknown key {name!r} = {_show(value)}; {remedy}"
    if kind == "missing" and keys[-1].isdecimal():  # an item of a tuple, which is of a set length
        return f"{'.'.join(keys[:-1])}: it has {len(value)} items, and needs more"
    if kind in _MISSING:
        return f"key {name!r} is missing; {getattr(cls, 'REMEDIES', {}).get(name, 'it has no default')}"
    if kind == "value_error":  # raised by a dataclass about itself; its message names field and value
        text = message.removeprefix("Value error, ")
        return f"{name}: {text}" if name else text
    if kind == "dataclass_type" and (names := _field_names(cls, keys)):
        return f"{name}: it is a mapping of {', '.join(names)}; got {_show(value)}"
    hint = "; quote it to make it text" if kind == "string_type" and isinstance(value, bool | int | float) else ""
    return f"{name}: {message[:1].lower()}{message[1:]}, got {_show(value)}{hint}"


def _close_key(cls: type[Any], keys: Sequence[str], value: Any, siblings: Sequence[str]) -> str | None:
    """The dotted key that an unknown one was meant to be: one that is written alike, or that ends alike."""
    every = list(_dotted_keys(cls))
    inner = [".".join([*keys, key]) for key in value] if isinstance(value, dict) else []
    for name in [*inner, ".".join(keys)]:
        leaf = name.rpartition(".")[2]
        if beside := difflib.get_close_matches(keys[-1], siblings, n=1):
            ours = ".".join([*keys[:-1], beside[0], *name.split(".")[len(keys) :]])
            return ours if ours in every else ".".join([*keys[:-1], beside[0]])
        if close := [key for key in every if key.rpartition(".")[2] == leaf] or difflib.get_close_matches(
            name, every, 1
        ):
            return close[0]
    return None


def _dotted_keys(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """All keys of a config, those of the sections in it after their own."""
    hints = get_type_hints(cls)
    for each in fields(cls):
        name = prefix + each.name
        yield name
        for member in _dataclasses(hints[each.name]):
            yield from _dotted_keys(member, f"{name}.")


def _key_path(raw: Any, detail: ErrorDetails) -> list[str]:
    """The keys of an error's place, without the names pydantic puts in for the members of a union."""
    keys: list[str] = []
    here = raw
    for part in detail["loc"]:
        children = dict(enumerate(here)) if isinstance(here, list) else here if isinstance(here, dict) else {}
        known = part in children
        here = children[part] if known else here
        if known or (part == detail["loc"][-1] and detail["type"].startswith("missing")):
            keys.append(str(part))
    return keys


def _field_names(cls: type[Any], keys: Sequence[str]) -> list[str]:
    """Fields of the dataclasses that may stand at a key path."""
    found = list(_dataclasses(cls))
    for key in keys:
        hints = [hint for owner in found for name, hint in get_type_hints(owner).items() if name == key]
        if not key.isdecimal():  # an item of a list has its list's members
            found = [member for hint in hints for member in _dataclasses(hint)]
    return sorted({field.name for owner in found for field in fields(owner)})


def _dataclasses(hint: Any) -> Iterator[type[Any]]:
    if is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for argument in get_args(hint):
        yield from _dataclasses(argument)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
