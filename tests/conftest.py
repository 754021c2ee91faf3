import importlib.util
import os
import sys

import pytest

# Tests run on a cluster of their own, never on one that the shell happens to point at.
os.environ.pop("RAY_ADDRESS", None)

# Threads of small products wait for each other by spinning: two test processes on two cores would mostly wait so.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shapes and types in lumos' signatures are checked at run time. This must come before anything imports lumos.
if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    import tests.typecheck  # noqa: F401 (the hook names it by string)

    install_import_hook("lumos", "tests.typecheck.check")


@pytest.fixture(autouse=True)
def _threads_of_one_test():
    """A test that computes with more threads leaves them to no other."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def ray_cluster():
    """The cluster that all tests of this process share; it runs whenever a test that asks for it does."""
    from tests.cluster import stop_shared_cluster

    yield
    stop_shared_cluster()


@pytest.fixture
def no_cluster():
    """Ray is not running when the test begins."""
    from tests.cluster import stop_shared_cluster

    stop_shared_cluster()


@pytest.hookimpl(tryfirst=True)  # before the fixtures, some of which are of a whole session
def pytest_runtest_setup(item):
    if "ray_cluster" in item.fixturenames:
        from tests.cluster import shared_cluster

        shared_cluster()


_LONGEST = ("training/test_train.py", "data/test_exactly_once.py", "data/test_curate.py", "storage/test_s3.py")


def pytest_collection_modifyitems(items):
    """The modules that take longest come first, so that both processes end at about the same time."""
    order = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get("/".join(item.path.parts[-2:]), len(order)))
