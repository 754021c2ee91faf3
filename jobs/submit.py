"""``lumos submit``: a verb as a job of a Ray cluster."""

import importlib
import os
import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import ExampleCommand, run
from jobs.jobs import address_option
from pipelines.submission.request import VERBS

_PROJECTS = ("auto", "upload", "installed")


@click.command(
    cls=ExampleCommand,
    context_settings={"ignore_unknown_options": True},
    short_help="Run a verb as a job of a Ray cluster, and follow it.",
    examples=(
        "lumos submit curate s3://bucket/videos dataset=s3://bucket/data --address http://head:8265",
        "lumos submit train quickstart data.dataset=s3://bucket/data output=s3://bucket/run --name first --no-wait",
        "lumos submit generate videos.yaml model=s3://bucket/run/export output=s3://bucket/videos",
        "lumos submit serve --model s3://bucket/run/export --jobs s3://bucket/jobs  # until it is stopped",
        "lumos jobs list; lumos jobs logs first --follow; lumos jobs stop first",
    ),
)
@click.argument("verb", type=click.Choice(VERBS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="CONFIG [KEY=VALUE]... [OPTIONS OF VERB]")
@address_option
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the job, and end with its status.")
@click.option("--name", help="Begins the job's id, and stands for its latest job in `lumos jobs`; else the verb.")
@click.option("--env", "variables", multiple=True, metavar="NAME[=VALUE]", help="A variable of the job; no secrets.")
@click.option("--project", type=click.Choice(_PROJECTS), default="auto", show_default=True, help="Whose code runs.")
@click.option("--shared-paths", is_flag=True, help="Paths of this machine are the same files on all nodes.")
def command(
    verb: str, arguments: tuple[str, ...], address: str | None, wait: bool, variables: tuple[str, ...],
    name: str | None, project: str, shared_paths: bool,
) -> None:  # fmt: skip
    """Run a VERB as a job of a Ray cluster, and follow it from here.

    Config, address, token, versions of Ray and Python, and places are checked here first; nothing is uploaded unless
    all are good. What was checked is what runs: the resolved config goes along. Prints the job's id, follows its log,
    and ends with 0 if it succeeded, 1 if it failed or was stopped. A connection that drops is taken up again. Ctrl-C
    asks whether to stop the job or to leave it (130).

    CODE: a checkout is uploaded (a few MB; --project upload). An installed release is expected on the cluster too
    (--project installed), where the job refuses another version or commit.

    PLACES: a job runs on other machines: name s3:// addresses. Local paths are taken if all nodes are this machine, or
    by --shared-paths.

    SECRETS: a job's variables can be read by all who may see the job, so none goes along unasked but LUMOS_SCORES and
    LUMOS_CAPTIONERS, and --env refuses what looks secret. Credentials of S3, MLflow and captioners stand in the
    environment of the cluster's own processes. The cluster's token is read here from RAY_AUTH_TOKEN, the file of
    RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
    """
    from pipelines.submission.request import config_to_yaml_text, read_request
    from pipelines.submission.secrets import carried_variables

    show_only = "--print-config" in arguments
    given = tuple(argument for argument in arguments if argument != "--print-config")
    carried = carried_variables(variables, os.environ)
    request = read_request(verb, importlib.import_module(f"jobs.{verb}").command, given)
    if show_only:
        click.echo(config_to_yaml_text(request.config or {}), nl=False)
        return

    from pipelines.submission.attend import attend
    from pipelines.submission.client import open_client
    from pipelines.submission.submit import Options, submit

    options = Options(name=name, variables=carried, project=project, shared_paths=shared_paths)
    client = open_client(address)
    job_id = submit(client, request, options)
    click.echo(job_id)
    if wait:
        sys.exit(attend(client, job_id))
    click.echo(f"follow it: lumos jobs logs {job_id} --follow", err=True)


if __name__ == "__main__":
    run(command)
