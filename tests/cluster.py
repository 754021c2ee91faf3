"""The Ray cluster that the tests of one process share, as each start takes seconds, and those of other sizes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipelines.cluster import connect

CPUS = 6
_shared = ExitStack()
_runs = False


def shared_cluster() -> None:
    """Be connected to the shared cluster, which is started if it does not run."""
    global _runs
    if not _runs:
        _shared.enter_context(connect(num_cpus=CPUS))
        _runs = True


def stop_shared_cluster() -> None:
    """Stop it, if it runs."""
    global _runs
    _runs = False
    _shared.close()


@contextmanager
def own_cluster(num_cpus: int = CPUS) -> Iterator[None]:
    """A cluster for the block alone: of another size, or of this moment's environment."""
    stop_shared_cluster()
    with connect(num_cpus=num_cpus):
        yield
