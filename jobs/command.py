"""What the verbs share: the CONFIG argument, the shipped configs in ``--help``, and exit statuses."""

import glob
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from pipelines.config import COMPLETE, ConfigT, find_config, load_config, shipped_configs, show_config
from pipelines.errors import JobError, UserError

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class ExampleCommand(click.Command):
    """A command whose ``--help`` ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what comes after the options."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")  # unwrapped, to be copied


class ConfigCommand(ExampleCommand):
    """A command whose ``--help`` ends with examples and the shipped configs, each with the first line of its file."""

    def __init__(self, *args: Any, kind: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind = kind

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what comes after the options."""
        super().format_epilog(ctx, formatter)
        rows = []
        for name in shipped_configs(self.kind):
            first_line = find_config(self.kind, name).read_text(encoding="utf-8").partition("\n")[0]
            rows.append((name, first_line.lstrip("# ")))
        if rows:
            with formatter.section("Shipped configs"):
                formatter.write_dl(rows)
        with formatter.section("Config keys"):
            formatter.write_text("--print-config prints all of them with their values; KEY=VALUE changes one.")


def config_arguments(required: bool = True) -> Callable[[CommandT], CommandT]:
    """The arguments CONFIG [KEY=VALUE]... and the option --print-config."""

    def decorate(function: CommandT) -> CommandT:
        print_help = "Print the resolved config as YAML and exit."
        function = click.option("--print-config", is_flag=True, help=print_help)(function)
        function = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)
        return click.argument("config", required=required, metavar="CONFIG" if required else "[CONFIG]")(function)

    return decorate


def curate_arguments(config: str, overrides: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """CONFIG and overrides of a curation; what names a source stands for the default config with that source."""
    names_config = config.endswith((".yaml", ".yml")) or not (
        Path(config).exists() or Path(config).suffix or "/" in config or glob.has_magic(config)
    )
    if names_config:
        return config, overrides
    return "default", (f"source.path={json.dumps(config, ensure_ascii=False)}", *overrides)


def resolve(cls: type[ConfigT], config: str, overrides: Sequence[str], print_config: bool) -> ConfigT:
    """Load the config; with ``print_config``, print it, what it misses left out, and end the command."""
    if not print_config:
        return load_config(cls, config, overrides)
    context = click.get_current_context()
    click.echo(show_config(cls, config, overrides, complete=context.obj == COMPLETE), nl=False)
    context.exit(0)


def run(command: click.Command) -> None:
    """Run a command and end the process: 0 done, 1 failed, 2 bad usage, configuration or input.

    Only ``UserError`` and ``JobError`` are told in one line; anything else is a bug and keeps its traceback.
    """
    try:
        command()
    except (UserError, JobError) as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps what was raised on a worker
        click.echo(f"error: {cause}", err=True)
        sys.exit(2 if isinstance(cause, UserError) else 1)
