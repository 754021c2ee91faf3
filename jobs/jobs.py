"""``lumos jobs``: the jobs of a Ray cluster."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import run

_ADDRESS_HELP = "The dashboard, http://HOST:8265; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or a cluster here."
address_option = click.option("--address", metavar="URL", help=_ADDRESS_HELP)


@click.group()
def command() -> None:
    """Look after the jobs of a Ray cluster: `lumos submit` starts them.

    JOB is an id, or a name (`lumos submit --name`), which stands for the latest job of that name.
    """


@command.command("list", short_help="Jobs with their status, the latest first.")
@address_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(address: str | None, as_json: bool) -> None:
    """List the cluster's jobs: id, name, verb, status, begin, length.

    Example: lumos jobs list --json
    """
    import json

    from pipelines.submission.client import open_client
    from pipelines.submission.listing import as_table, as_values, list_jobs

    rows = list_jobs(open_client(address))
    click.echo(json.dumps(as_values(rows), indent=2) if as_json else as_table(rows))


@command.command(short_help="What a job has printed; --follow goes on until it ends.")
@click.argument("job")
@click.option("--follow", "until_end", is_flag=True, help="Until the job ends, and with its status.")
@address_option
def logs(job: str, until_end: bool, address: str | None) -> None:
    """Print the log of a JOB.

    Example: lumos jobs logs first --follow
    """
    from pipelines.submission.attend import attend, show_log
    from pipelines.submission.client import open_client
    from pipelines.submission.listing import find_job

    client = open_client(address)
    job_id = find_job(client, job)
    if until_end:
        sys.exit(attend(client, job_id))
    show_log(client, job_id)


@command.command(short_help="Stop a job, and wait for its end.")
@click.argument("job")
@address_option
def stop(job: str, address: str | None) -> None:
    """Stop a JOB and wait until it has ended; a training saves a checkpoint first.

    Example: lumos jobs stop first
    """
    from pipelines.submission import follow
    from pipelines.submission.client import open_client
    from pipelines.submission.listing import find_job

    client = open_client(address)
    click.echo(str(follow.stop(client, find_job(client, job), lambda text: click.echo(text, err=True))))


if __name__ == "__main__":
    run(command)
