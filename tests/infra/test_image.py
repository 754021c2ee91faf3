"""The image and the files of `ray up`, as far as they can be looked at without Docker and machines."""

import re
import shlex
import tomllib
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.infra.manifests import ROOT, pinned

DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text()
VM_FILES = sorted((ROOT / "infra" / "cluster" / "vm").glob("*.yaml"))


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile: name and what follows it, comments left out and lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name.isupper()]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name; those before the first one are left out."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions(text):
        if name == "FROM":
            found[rest.split(" AS ")[1]] = []
        elif found:
            list(found.values())[-1].append((name, rest))
    return found


def check_dockerfile(text: str) -> list[str]:
    """What is wrong with the image, in words."""
    found = []
    build, run = stages(text)["build"], stages(text)["run"]
    users = [rest for name, rest in run if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append("does not run as a user other than root, by number")
    if "PIP_CONSTRAINT=/build/infra/constraints.txt" not in dict(build).get("ENV", "") + str(build):
        found.append("packages are not pinned by the constraints")
    installed = {word for name, rest in run if name == "RUN" for word in shlex.split(rest)}
    if compilers := installed & {
        "gcc",
        "g++",
        "build-essential",
        "clang",
        "ninja-build",
        "cmake",
        "nvidia-cuda-toolkit",
    }:
        found.append(f"holds compilers: {sorted(compilers)}")
    copied = [rest for name, rest in run if name == "COPY"]
    if copied != ["--from=build /opt/lumos /opt/lumos"]:
        found.append(f"copies more than what was installed: {copied}")
    if not re.search(r"PATH=/opt/lumos/bin:\$PATH\S* > /etc/profile\.d/\w+\.sh", str(run)):
        found.append("hides its programs from login shells, which ray up starts")
    if not {"wget", "rsync", "openssh-client"} <= installed:
        found.append("lacks wget (KubeRay's probe), or rsync and ssh (ray up)")
    return found


def test_image_is_not_root_pinned_and_without_compilers():
    assert check_dockerfile(DOCKERFILE) == []
    (python,) = re.findall(r"^ARG PYTHON=(\d+\.\d+)-slim", DOCKERFILE, re.MULTILINE)
    assert f"Python {python})" in (ROOT / "infra" / "constraints.txt").read_text()
    assert re.search(r"^ARG DEVICE=cpu$", DOCKERFILE, re.MULTILINE)
    assert f"the constraint {pinned('torch')} is met" in DOCKERFILE.replace("\n# ", " ")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("USER 1000:1000", "USER root", "root"),
        ("USER 1000:1000", "", "root"),
        ("PIP_CONSTRAINT=/build/infra/constraints.txt", "X=1", "pinned"),
        ("tini wget", "tini wget gcc", "compilers: ['gcc']"),
        ("COPY --from=build /opt/lumos /opt/lumos", "COPY . .", "copies more"),
        ("tini wget", "tini", "lacks wget"),
        ("/etc/profile.d/lumos.sh", "/etc/lumos.sh", "login shells"),
    ],
)
def test_planted_error_of_the_image_is_told(old, new, told):
    assert old in DOCKERFILE
    assert told in "\n".join(check_dockerfile(DOCKERFILE.replace(old, new)))


def installed_with(requirements: list[str]) -> set[str]:
    """Names of all packages that these bring, by what is installed here."""
    todo = set(map(Requirement, requirements))
    seen = set(todo)
    while todo:
        wanted = todo.pop()
        for needed in map(Requirement, metadata.requires(wanted.name) or ()):
            extras = {"", *wanted.extras}
            if needed not in seen and (not needed.marker or any(needed.marker.evaluate({"extra": x}) for x in extras)):
                seen.add(needed)
                todo.add(needed)
    return {canonicalize_name(each.name) for each in seen}


def test_packages_of_the_image_hold_what_a_server_of_mlflow_imports_for_s3_and_postgresql():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "project['dependencies'] + project['optional-dependencies']['mlflow-server']" in DOCKERFILE
    packages = installed_with([*project["dependencies"], *project["optional-dependencies"]["mlflow-server"]])
    assert {"boto3", "flask-wtf", "psycopg", "psycopg-binary"} <= packages


def sent(path: str, patterns: list[str]) -> bool:
    """Whether Docker sends a file to the build: the last pattern that matches it, or a folder above it, decides."""
    parts = Path(path).parts
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    result = True
    for pattern in patterns:
        wanted = pattern.startswith("!")
        names = [name.rpartition("/")[2] for name in above] if "**/" in pattern else above
        if any(fnmatch(name, pattern.lstrip("!").removeprefix("**/")) for name in names):
            result = wanted
    return result


def test_dockerignore_sends_what_is_installed_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    for path in (".git/config", "tests/conftest.py", ".env", "infra/.env.prod", "lumos-demo/summary.json", "id_rsa"):
        assert not sent(path, patterns), path
    assert not sent("lumos/__pycache__/api.cpython-311.pyc", patterns)
    copied = [rest.split()[:-1] for name, rest in stages(DOCKERFILE)["build"] if name == "COPY"]
    for path in {each for group in copied for each in group}:
        inside = f"{path}/x.py" if (ROOT / path).is_dir() else path
        assert (ROOT / path).exists(), path
        assert sent(inside, patterns), path


@pytest.mark.parametrize("path", VM_FILES, ids=lambda path: path.name)
def test_file_of_ray_up_is_as_ray_wants_it(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    images = re.findall(r"REGISTRY/lumos-ray:\S+", str(config["docker"]) + str(config.get("available_node_types")))
    assert images
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    # Ray adds --runtime=nvidia and nothing else, and the image, which is none of CUDA's own, does not set it.
    assert "--env=NVIDIA_VISIBLE_DEVICES=all" in config["docker"]["run_options"]
    head = " ".join(config["head_start_ray_commands"])
    assert "--num-cpus=0" in head, "the head does work"
    assert "--dashboard-host=127.0.0.1" in head, "the dashboard listens to the network"


def test_both_kinds_of_machines_have_a_file_of_ray_up():
    assert [yaml.safe_load(path.read_text())["provider"]["type"] for path in VM_FILES] == ["aws", "local"]


def test_planted_error_of_ray_up_is_told():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(VM_FILES[0].read_text())
    with pytest.raises(ValidationError, match="run_option"):
        validate_config(prepare_config({**config, "docker": {**config["docker"], "run_option": []}}))
