"""The service as a config file of Ray Serve names it, which is how KubeRay starts it."""

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray._common.utils import import_attr
from ray.serve._private.build_app import build_app
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from jobs.serve_application import build
from pipelines import storage
from pipelines.config import PROJECT_DIR, config_to_yaml
from pipelines.errors import UserError
from pipelines.generation.config import ServeConfig
from pipelines.generation.serving.request_ids import PROXY_VARIABLES, before_proxy
from pipelines.generation.serving.run import TOKEN_VARIABLE
from tests.cluster import own_cluster
from tests.pipelines.generation.conftest import free_port

TOKEN = "sesame"


def serve_file() -> dict[str, Any]:
    """Serve's config in the manifest."""
    (service, *_) = yaml.safe_load_all((PROJECT_DIR / "infra/cluster/kuberay/rayservice.yaml").read_text())
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


@pytest.fixture
def config_file(serve_config: ServeConfig, tmp_path: Path) -> str:
    path = tmp_path / "serve.yaml"
    path.write_text(config_to_yaml(replace(serve_config, jobs=str(tmp_path / "jobs"))))
    return str(path)


def test_application_has_the_deployments_that_the_manifest_names(config_file, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    application = build({"config": config_file, "overrides": ["host=0.0.0.0", "api_replicas=2"]})
    built = build_app(application, name="lumos", default_runtime_env={})
    deployments = {deployment.name: deployment for deployment in built.deployments}
    (named,) = serve_file()["applications"]
    assert {each["name"] for each in named["deployments"]} == set(deployments)
    assert deployments["api"].num_replicas == 2


def test_http_side_starts_on_a_machine_that_has_not_read_the_model(
    config_file, model_dir, s3_uri, tmp_path, monkeypatch
):
    for path in model_dir.iterdir():
        storage.write_bytes_atomic(f"{s3_uri}/model/{path.name}", path.read_bytes())
    monkeypatch.setenv("LUMOS_CACHE", str(tmp_path / "here"))
    application = build({"config": config_file, "overrides": [f"model={s3_uri}/model"]})
    shutil.rmtree(tmp_path / "here")
    monkeypatch.setenv("LUMOS_CACHE", str(tmp_path / "there"))
    bound = application._bound_deployment
    plain = bound.func_or_class.__mro__[1]  # without Serve's wrapper, which wants an event loop
    api = plain(*bound.init_args).__serve_build_asgi_app__()
    assert "/v1/videos" in api.openapi()["paths"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"overrides": ["model=nowhere"]}, "nowhere"),
        ({"overrides": ["modle=x"]}, "modle"),
        ({"overrides": ["model=x", "host=0.0.0.0"]}, "needs a token"),
        ({"override": []}, "unknown override"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_made(args, told, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=re.escape(told)):
        build(args)


def test_proxies_of_the_manifest_settle_ids_as_those_of_the_command():
    options = ServeDeploySchema.model_validate(serve_file()).controller_options
    assert options is not None
    assert options.runtime_env == {"env_vars": PROXY_VARIABLES}
    (path,) = PROXY_VARIABLES.values()
    assert import_attr(path) is before_proxy


def wait_until_running(times: int = 120) -> None:
    for _ in range(times):
        status = serve.status().applications["lumos"]
        if status.status == "RUNNING" and all(each.status == "HEALTHY" for each in status.deployments.values()):
            return
        assert status.status != "DEPLOY_FAILED", status.message
        time.sleep(0.5)
    raise AssertionError(status)


@pytest.mark.slow
def test_serve_config_of_the_manifest_runs_and_changes_in_place(config_file, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    port = free_port()
    config = serve_file()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"] = {"config": config_file, "overrides": [f"port={port}", "replicas.num_replicas=1"]}
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {TOKEN}"}
    started = {name: config[name] for name in ("proxy_location", "http_options", "controller_options")}
    with own_cluster(num_cpus=3):
        serve.start(**started)
        try:
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
            wait_until_running()
            body = {"prompt": "a red square moves left", "seed": 7}
            assert httpx.post(f"{url}/v1/videos/sync", json=body, timeout=60.0).status_code == 401
            first = httpx.post(f"{url}/v1/videos/sync", json=body, headers=headers, timeout=60.0)
            assert first.status_code == 200
            ill_formed = httpx.get(f"{url}/health", headers=[(b"x-request-id", b"\xe9")], timeout=60.0)
            assert (ill_formed.status_code, len(ill_formed.headers["x-request-id"])) == (200, 16)

            application["args"]["overrides"].append("sampling.num_steps=2")
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
            time.sleep(1.0)
            wait_until_running()
            second = httpx.post(f"{url}/v1/videos/sync", json=body, headers=headers, timeout=60.0)
            assert second.status_code == 200
            assert second.content != first.content
        finally:
            serve.shutdown()
