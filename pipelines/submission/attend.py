"""A job followed on a terminal, or by a script, until it ends or is left."""

import sys

import click

from pipelines.errors import JobError
from pipelines.submission.client import JobClient
from pipelines.submission.follow import follow, stop
from pipelines.submission.listing import read_log
from pipelines.submission.log_view import LogView

LEFT = 130  # exit status of a command that was interrupted while its job goes on


def attend(client: JobClient, job_id: str) -> int:
    """Show a job's log until it ends. At Ctrl-C ask whether to stop it or to leave it; without a terminal, leave it.

    Returns:
        The exit status: 0 if the job succeeded, ``LEFT`` if it was left.

    Raises:
        JobError: if it failed or was stopped.
    """
    view = LogView(_print, terminal=sys.stdout.isatty())
    try:
        end = follow(client, job_id, view, _say)
    except KeyboardInterrupt:
        if not _wants_stop(job_id):
            _say(f"job {job_id} goes on: lumos jobs logs {job_id} --follow, or lumos jobs stop {job_id}")
            return LEFT
        try:
            end = stop(client, job_id, _say)
        except KeyboardInterrupt:
            _say(f"job {job_id} is stopping; lumos jobs list says when it has")
            return LEFT
    if not end.succeeded:
        raise JobError(str(end))
    _say(str(end))
    return 0


def show_log(client: JobClient, job_id: str) -> None:
    """Print what a job has printed until now; of a progress bar, its first and its last state."""
    view = LogView(_print, terminal=False, clock=lambda: 0.0)
    view.feed(read_log(client, job_id))
    view.close()


def _print(text: str) -> None:
    click.echo(text, nl=False)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _wants_stop(job_id: str) -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return click.confirm(f"\nStop job {job_id}? Otherwise it is left to run", default=False, err=True)
    except click.Abort:  # another Ctrl-C
        return False
