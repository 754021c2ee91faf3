"""An S3 server behind a proxy, for the tests that ask for a bucket."""

import hashlib
import json
import os
from collections import Counter

import fsspec
import pytest
from s3fs import S3FileSystem

from pipelines.storage.store import S3Store
from tests.cluster import own_cluster
from tests.pipelines.data.corpora import write_corpus
from tests.pipelines.storage.faults import KINDS, faulty_proxy, s3_server

_FSSPEC = {"config_kwargs": {"read_timeout": 1.5}}  # seconds that a stalled request costs
_NO_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@pytest.fixture(scope="module")
def server():
    """The server's port, without a proxy before it."""
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def proxy(server):
    """What AWS_ENDPOINT_URL names, here and in Ray's workers."""
    with faulty_proxy(server) as proxy, pytest.MonkeyPatch.context() as patch:
        for name in _NO_CREDENTIALS:
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("FSSPEC_S3", json.dumps(_FSSPEC))
        patch.setitem(fsspec.config.conf, "s3", _FSSPEC)
        yield proxy


@pytest.fixture
def calm(proxy):
    """Each test begins and ends without faults, and with clients of its own environment."""
    proxy.share, proxy.answer = 0.0, None
    proxy.faults, proxy.requests, proxy.paths, proxy.kinds = Counter(), Counter(), [], KINDS
    S3Store.clear_instance_cache()
    yield
    proxy.share, proxy.answer = 0.0, None
    S3Store.clear_instance_cache()


@pytest.fixture(scope="module")
def direct(server):
    """A client that does not go through the proxy, nor through storage.py."""
    options = {"endpoint_url": f"http://127.0.0.1:{server}", "use_listings_cache": False}
    return S3FileSystem(key="test", secret="test", skip_instance_cache=True, **options)


@pytest.fixture
def bucket(direct, calm, request):
    """An empty one, behind a proxy that lets nothing fail yet."""
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    direct.mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def ray(proxy):
    """A cluster whose workers have the environment that leads to the proxy."""
    with own_cluster():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A corpus without what only disks have: links that lead nowhere."""
    folder = write_corpus(tmp_path_factory.mktemp("s3") / "videos")
    (folder / "link.mp4").unlink()
    return folder
