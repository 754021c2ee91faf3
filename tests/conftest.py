import importlib.util
import os

import pytest

# Tests run on a cluster of their own, never on one that the shell happens to point at.
os.environ.pop("RAY_ADDRESS", None)

# Shapes and types in lumos' signatures are checked at run time. This must come before anything imports lumos.
if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    import tests.typecheck  # noqa: F401 (the hook names it by string)

    install_import_hook("lumos", "tests.typecheck.check")


@pytest.fixture(scope="module")  # gone at the module's end: tests of other modules start clusters of other sizes
def ray_cluster():
    from pipelines.cluster import connect

    with connect(num_cpus=6):
        yield


_LONGEST = ("training/test_train", "storage/test_s3.py", "data/test_exactly_once", "data/captions/test_choose")


def pytest_collection_modifyitems(items):
    """Modules that take minutes come first, so that both processes end at about the same time."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in _LONGEST))
