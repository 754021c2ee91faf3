"""Commands in manifests and their README: parsed by the command line's own parser, configs by the project's loader."""

import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import click

from jobs.cli import _VERBS
from jobs.command import curate_arguments
from pipelines.config import load_config
from pipelines.errors import UserError


def _config_class(verb: str) -> Any:
    module, name = {
        "curate": ("pipelines.data.config", "CurateConfig"),
        "train": ("pipelines.training.config", "TrainConfig"),
        "generate": ("pipelines.generation.config", "GenerateConfig"),
        "serve": ("pipelines.generation.config", "ServeConfig"),
    }[verb]
    return getattr(importlib.import_module(module), name)


def check_command(words: Sequence[str]) -> Iterator[str]:
    """What is wrong with a command that a manifest names, in words."""
    program, *arguments = words
    try:
        if program == "lumos":
            _check_lumos(*arguments)
        elif program == "mlflow":
            _parse(importlib.import_module("mlflow.cli").cli.commands[arguments[0]], arguments[1:])
        else:
            yield f"{program}: the image has no such command"
    except (click.ClickException, UserError, KeyError) as error:
        told = error.format_message() if isinstance(error, click.ClickException) else error
        yield f"{shlex.join(words)}: {told}"


def _parse(command: click.Command, arguments: Sequence[str]) -> dict[str, Any]:
    return command.make_context(command.name, list(arguments), auto_envvar_prefix=None).params


def _check_lumos(verb: str, *arguments: str) -> None:
    if verb not in _VERBS:
        raise UserError(f"there is no verb {verb}")
    command = importlib.import_module(f"jobs.{verb}").command
    if isinstance(command, click.Group):  # evaluate DIR...: what it does without naming a verb
        _parse(command.commands["folders"], arguments)
        return
    params = _parse(command, arguments)
    config, overrides = params["config"], tuple(params["overrides"])
    if verb == "curate":
        config, overrides = curate_arguments(config, overrides)
    load_config(_config_class(verb), config, overrides)


def commands_in(text: str) -> list[list[str]]:
    """The `lumos` commands of a text: in lines of their own, comments, or after `ray job submit ... --`."""
    found = re.findall(r"^[#\s]*(?:ray job submit [^\n]*-- )?(lumos [a-z][^\n]*)", text, re.MULTILINE)
    return [shlex.split(command, comments=True) for command in found]
