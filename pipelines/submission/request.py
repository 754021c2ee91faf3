"""What is asked of a cluster: a verb, its config as it was checked here, and which of its values are places."""

import contextlib
import io
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import click
import yaml

from pipelines.config import COMPLETE
from pipelines.errors import UserError
from pipelines.submission.secrets import leaves, refuse_secrets

CONFIG_FILE = "lumos-job.yaml"  # in the job's working directory

# Keys of a verb's config that name files or folders; "*" is any item. The test of this module knows every other key.
CONFIG_PLACES = {
    "curate": (
        "dataset",
        "source.path",
        "overrides",
        "split.weights",
        "features.clip.weights",
        "features.aesthetic_head",
        "features.nsfw_head",
        "features.text_detector",
        "captions.file",
        "captions.coca.weights",
        "tokens.tokenizer.path",
    ),
    "train": (
        "output",
        "data.dataset",
        "data.sources.*.dataset",
        "data.tokenizer.path",
        "data.text_tokenizer",
        "deepspeed",
        "fork_from",
        "init_from",
        "checkpoint.storage",
        "samples.clip.weights",
        "tracking.uri",
    ),
    "generate": (
        "model",
        "prompts",
        "output",
        "image",
        "clip",
        "images",
        "long_prompts",
        "text_tokenizer",
        "tokenizer.path",
    ),
    "serve": ("model", "models.*", "jobs", "text_tokenizer", "tokenizer.path"),
}

# The same of verbs without a config: parameters of their commands.
ARGUMENT_PLACES = {
    "demo": ("out",),
    "evaluate": ("folders", "files", "out", "reference", "clip", "lpips", "fvd", "tracking_uri"),
    "export": ("checkpoint", "out"),
}

VERBS = ("curate", "train", "generate", "serve", "evaluate", "export", "demo")
_BESIDE_CONFIG = {"train": ("--dry-run",)}  # options that are not keys


@dataclass(frozen=True, kw_only=True)
class Request:
    """A verb with what it is given."""

    verb: str
    config: Mapping[str, Any] | None = None  # resolved and checked, as plain values
    arguments: tuple[str, ...] = ()  # of the command line, beside the config
    places: Mapping[int, str] = field(default_factory=dict)  # which arguments name files or folders, and of what

    @property
    def entrypoint(self) -> str:
        """The job's command, run in its working directory."""
        config = [CONFIG_FILE] if self.config is not None else []
        return shlex.join(["python", "-m", "jobs.cli", self.verb, *config, *self.arguments])

    @property
    def files(self) -> dict[str, str]:
        """Files that the command reads in its working directory, by name."""
        return {} if self.config is None else {CONFIG_FILE: config_to_yaml_text(self.config)}


def config_to_yaml_text(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that ``load_config`` reads."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)


def read_request(verb: str, command: click.Command, arguments: Sequence[str]) -> Request:
    """Check a verb's arguments as the verb itself does, with its messages.

    Args:
        verb: one of ``VERBS``.
        command: that of the verb; for one with a config, it has the option ``--print-config``.
        arguments: what stands behind the verb.

    Raises:
        UserError: if the config is not usable, or holds a secret.
        click.ClickException: for bad usage.
    """
    if verb in CONFIG_PLACES:
        printed = io.StringIO()
        beside = tuple(item for item in arguments if item in _BESIDE_CONFIG.get(verb, ()))
        with contextlib.redirect_stdout(printed):
            command.main([*arguments, "--print-config"], prog_name=f"lumos {verb}", standalone_mode=False, obj=COMPLETE)
        request = Request(verb=verb, config=yaml.safe_load(printed.getvalue()), arguments=beside)
    else:
        request = _without_config(verb, command, list(arguments))
    refuse_secrets(request.config or {}, request.arguments)
    return request


def _without_config(verb: str, command: click.Command, arguments: list[str]) -> Request:
    built: list[str] = []
    if isinstance(command, click.Group):  # evaluate, whose first argument may be left out
        names = list(command.commands)
        name = arguments.pop(0) if arguments and arguments[0] in names else names[0]
        built, command = [name], command.commands[name]
    context = command.make_context(f"lumos {verb}", list(arguments))  # for its messages
    given, _, _ = command.make_parser(context).parse_args(list(arguments))  # as text: a Path would spoil s3://
    places: dict[int, str] = {}
    for parameter in sorted(command.get_params(context), key=lambda each: isinstance(each, click.Argument)):
        name, is_option = str(parameter.name), isinstance(parameter, click.Option)
        value = given.get(name)
        if isinstance(parameter, click.Option) and parameter.is_flag:
            built += parameter.opts[-1:] if value is True else []
            continue
        if name in ARGUMENT_PLACES[verb] and not isinstance(value, str | list | tuple):
            value = _default_place(verb, parameter)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, str):
                built += [parameter.opts[-1], item] if is_option else [item]
                if name in ARGUMENT_PLACES[verb]:
                    places[len(built) - 1] = parameter.opts[-1] if is_option else name.upper()
    return Request(verb=verb, arguments=tuple(built), places=places)


def _default_place(verb: str, parameter: click.Parameter) -> str | None:
    """Where a verb writes unless told otherwise, which would be the job's own folder."""
    if verb == "export":
        raise UserError("export: name OUT, the folder to write: a job's current folder goes with the job")
    return str(parameter.default) if verb == "demo" else None


def with_places(request: Request, *, here: bool, shared: bool, where: str) -> Request:
    """The request with its local paths made absolute, as a job has another current folder.

    Args:
        request: as read.
        here: whether all nodes of the cluster are this machine.
        shared: whether its paths are the same files on all nodes, which the verb's config is told too.
        where: the cluster, in words.

    Raises:
        UserError: if a place is local and paths are not shared.
    """
    config = request.config
    if shared and config is not None:
        config = {**config, "cluster": {**config.get("cluster", {}), "shared_paths": True}}
    known = here or shared or (config or {}).get("cluster", {}).get("shared_paths") is True

    def absolute(key: str, value: str) -> str:
        if not _is_local(key, value):
            return value
        if not known:
            raise UserError(
                f"{key}: {value} is a path of this machine, which {where} does not have: use one that all its nodes "
                "read and write, such as s3://BUCKET/PREFIX; if a folder is mounted at the same path on all of them, "
                "say so by --shared-paths (the key cluster.shared_paths)"
            )
        return _absolute(value)

    arguments = tuple(
        absolute(request.places[index], item) if index in request.places else item
        for index, item in enumerate(request.arguments)
    )
    if config is not None:
        patterns = [re.compile(re.escape(key).replace(r"\*", ".+")) for key in CONFIG_PLACES[request.verb]]
        places = {
            key: absolute(key, value)
            for key, value in leaves(config)
            if isinstance(value, str) and value and any(pattern.fullmatch(key) for pattern in patterns)
        }
        config = _replaced(config, places)
    return replace(request, config=config, arguments=arguments, places={})


def _is_local(key: str, value: str) -> bool:
    """Whether a place is of this machine: a path, or SQLite's or MLflow's way to write one."""
    if key == "deepspeed" and "/" not in value and not value.endswith(".json"):
        return False  # a name of one that is shipped
    if value.startswith(("file:", "sqlite:")):
        return True
    return "://" not in value and not (key in ("tracking.uri", "--tracking-uri") and value.startswith("databricks"))


def _absolute(value: str) -> str:
    scheme = next((begin for begin in ("file://", "sqlite:///") if value.startswith(begin)), "")
    path = value.removeprefix(scheme)
    return scheme + os.path.abspath(path if scheme else os.path.expanduser(path))


def _replaced(values: Any, changes: Mapping[str, str], prefix: str = "") -> Any:
    if isinstance(values, Mapping):
        return {key: _replaced(value, changes, f"{prefix}.{key}" if prefix else key) for key, value in values.items()}
    if isinstance(values, list):
        return [_replaced(value, changes, f"{prefix}.{index}") for index, value in enumerate(values)]
    return changes.get(prefix, values)
