"""``lumos serve``: a model behind HTTP until interrupted."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import ConfigCommand, config_arguments, resolve, run


@click.command(cls=ConfigCommand, kind="serve", examples=("lumos serve default model=runs/quickstart/export",))
@config_arguments()
def command(config: str, overrides: tuple[str, ...], print_config: bool) -> None:
    """Serve a model over HTTP until interrupted (Ctrl-C).

    Loads an export folder into Ray Serve and answers POST /v1/videos. Listens on this machine alone unless the config
    says otherwise; any other address needs a bearer token.
    """
    from pipelines.generation.config import ServeConfig

    resolved = resolve(ServeConfig, config, overrides, print_config)

    from pipelines.generation.serving.run import serve

    serve(resolved)  # it joins Ray itself, once model, port and token are found good


if __name__ == "__main__":
    run(command)
