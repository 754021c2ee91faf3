"""The manifests of infra/cluster/kuberay, and what must hold in them. A check yields what is wrong, in words."""

import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.infra.commands import check_command

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "infra" / "cluster" / "kuberay"
README = (FOLDER / "README.md").read_text()

Doc = dict[str, Any]

# Environment variables that manifests may set, and where they are read: a file of an installed package that names
# them, "code" for this project, or in words where it is no Python.
READERS = {
    "AWS_ACCESS_KEY_ID": "botocore/credentials.py",
    "AWS_SECRET_ACCESS_KEY": "botocore/credentials.py",
    "AWS_DEFAULT_REGION": "botocore/configprovider.py",
    "AWS_ENDPOINT_URL": "botocore/configprovider.py",
    "LUMOS_CACHE": "code",
    "LUMOS_SERVE_TOKEN": "code",
    "MLFLOW_TRACKING_USERNAME": "mlflow/environment_variables.py",
    "MLFLOW_TRACKING_PASSWORD": "mlflow/environment_variables.py",
    "MLFLOW_AUTH_CONFIG_PATH": "mlflow/environment_variables.py",
    "MLFLOW_AUTH_ADMIN_USERNAME": "mlflow/environment_variables.py",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "mlflow/environment_variables.py",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "mlflow/environment_variables.py",
    "MLFLOW_S3_ENDPOINT_URL": "mlflow/environment_variables.py",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "mlflow/environment_variables.py",
    "NCCL_SOCKET_IFNAME": "in words: NCCL",
    "PGHOST": "in words: libpq",
    "PGSSLMODE": "in words: libpq",
    "PGUSER": "in words: libpq",
    "PGPASSWORD": "in words: libpq",
    "PGDATA": "in words: the image postgres",
    "POSTGRES_DB": "in words: the image postgres",
    "POSTGRES_USER": "in words: the image postgres",
    "POSTGRES_PASSWORD": "in words: the image postgres",
}
OTHER_IMAGES = {"postgres:17"}
_SECRET_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY|CREDENTIAL")
_SUFFIXES = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def load_manifests() -> dict[str, list[Doc]]:
    """Every file's documents; the values of the operator's chart and the patch are no objects of their own."""
    return {
        path.name: list(yaml.safe_load_all(path.read_text()))
        for path in sorted(FOLDER.glob("*.yaml"))
        if path.name not in ("operator-values.yaml", "rayservice-incremental.yaml")
    }


def quantity(value: str | int) -> float:
    """A number of Kubernetes, such as 500m or 12Gi."""
    number, suffix = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(value)).groups()
    return float(number) * (_SUFFIXES[suffix] if suffix else 1.0)


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within, with its place."""
    yield path, node
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield from walk(value, f"{path}.{key}" if path else str(key))


def ray_cluster(doc: Doc) -> Doc | None:
    """The spec of the cluster that an object is or makes."""
    keys = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
    if doc["kind"] not in keys:
        return None
    spec = doc["spec"]
    for key in keys[doc["kind"]]:
        spec = spec[key]
    return spec


def groups(cluster: Doc) -> list[tuple[Doc, int]]:
    """The head's group and the workers', each with how many pods it begins with."""
    return [
        (cluster["headGroupSpec"], 1),
        *((group, group["replicas"]) for group in cluster.get("workerGroupSpecs", ())),
    ]


def pod_templates(doc: Doc) -> list[Doc]:
    """The pod templates of an object."""
    if (cluster := ray_cluster(doc)) is not None:
        templates = [group["template"] for group, _ in groups(cluster)]
        submitter = doc["spec"].get("submitterPodTemplate")
        return templates + ([submitter] if submitter else [])
    return [doc["spec"]["template"]] if doc["kind"] in ("Deployment", "StatefulSet") else []


def containers(doc: Doc) -> list[Doc]:
    """The containers of an object."""
    return [container for template in pod_templates(doc) for container in template["spec"]["containers"]]


def environment(doc: Doc) -> Iterator[Doc]:
    """Every variable that a container gets."""
    for container in containers(doc):
        yield from container.get("env", ())


def secret_references(docs: list[Doc]) -> set[tuple[str, str]]:
    """Names and keys of the Secrets that are asked for."""
    found = set()
    for doc in docs:
        for path, node in walk(doc):
            if path.endswith("secretKeyRef"):
                found.add((node["name"], node["key"]))
            elif path.endswith("authOptions"):
                found.add((node["secretName"], "auth_token"))  # the operator's name of the key
    return found


def readme_secrets(text: str) -> set[tuple[str, str]]:
    """Names and keys of the Secrets that the README says how to make."""
    commands = re.findall(r"create secret generic (\S+)((?:[^\n]*\\\n)*[^\n]*)", text)
    return {(name, key) for name, rest in commands for key in re.findall(r"--from-literal=([\w-]+)=", rest)}


def check_images(doc: Doc) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dockerfile = (ROOT / "infra" / "Dockerfile").read_text()
    tags = {f"{project['version']}-{variant}" for variant in re.findall(r"^ +(cpu|cuda)\) ", dockerfile, re.MULTILINE)}
    ours = {f"REGISTRY/lumos-ray:{tag}" for tag in tags}
    for container in containers(doc):
        if container["image"] not in ours | OTHER_IMAGES:
            yield f"{container['name']}: image {container['image']} is none of {sorted(ours | OTHER_IMAGES)}"
    for group, _ in groups(ray_cluster(doc)) if ray_cluster(doc) else ():
        pod = group["template"]["spec"]["containers"][0]
        if "nvidia.com/gpu" in pod["resources"]["limits"] and not pod["image"].endswith("-cuda"):
            yield f"{pod['name']}: has GPUs and an image without CUDA"


def check_commands(doc: Doc) -> Iterator[str]:
    if doc["kind"] == "RayJob":
        entrypoint = doc["spec"]["entrypoint"]
        if re.search(r"[^\w\s./:=,%+@-]", entrypoint):
            yield f"entrypoint: the submitter's shell would change {entrypoint!r}"
        yield from check_command(shlex.split(entrypoint))
    for container in containers(doc):
        if words := [*container.get("command", ()), *container.get("args", ())]:
            yield from check_command(words)


def check_environment(doc: Doc) -> Iterator[str]:
    for variable in environment(doc):
        if variable["name"] not in READERS:
            yield f"env: nothing is known to read {variable['name']}"
        if "value" in variable and _SECRET_NAME.search(variable["name"]):
            yield f"env: {variable['name']} stands there in plain text"
    if doc["kind"] == "Secret":
        yield "a Secret: these are made by commands, not kept in files"
    for path, value in walk(doc):
        if isinstance(value, str) and re.search(r"://[^/\s:@]+:[^/\s@]+@", value):
            yield f"{path}: a password within an address"


def check_references(doc: Doc, docs: list[Doc]) -> Iterator[str]:
    maps = {each["metadata"]["name"]: each["data"] for each in docs if each["kind"] == "ConfigMap"}
    for path, node in walk(doc):
        asked = path.endswith("configMapKeyRef") and not node.get("optional")
        if asked and node["key"] not in maps.get(node["name"], {}):
            yield f"{path}: no ConfigMap {node['name']} with {node['key']}"
    for template in pod_templates(doc):
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        claims = {claim["metadata"]["name"] for claim in doc["spec"].get("volumeClaimTemplates", ())}
        mounted = {
            mount["name"]: mount for container in spec["containers"] for mount in container.get("volumeMounts", ())
        }
        if unknown := set(mounted) - set(volumes) - claims:
            yield f"volumeMounts: no volume {sorted(unknown)}"
        if unused := (set(volumes) | claims) - set(mounted):
            yield f"volumes: nobody mounts {sorted(unused)}"
        for container in spec["containers"]:
            files = {
                f"{mount['mountPath']}/{key}"
                for mount in container.get("volumeMounts", ())
                for key in maps.get(volumes.get(mount["name"], {}).get("configMap", {}).get("name"), ())
            }
            for variable in container.get("env", ()):
                if variable["name"].endswith("_PATH") and variable.get("value") not in files:
                    yield f"env: {variable['name']} is {variable.get('value')}, which is not mounted"


def check_resources(doc: Doc) -> Iterator[str]:
    parts = [(each["name"], each.get("resources", {})) for each in containers(doc)]
    cluster = ray_cluster(doc)
    if cluster and cluster.get("enableInTreeAutoscaling"):
        parts.append(("autoscaler", cluster.get("autoscalerOptions", {}).get("resources", {})))
    for name, resources in parts:
        limits = resources.get("limits", {})
        if resources.get("requests") != limits or not {"cpu", "memory"} <= set(limits):
            yield f"{name}: requests and limits of cpu and memory must be there, and equal"
    for group, _ in groups(cluster) if cluster else ():
        yield from _check_memory(group)


def _check_memory(group: Doc) -> Iterator[str]:
    """The object store must fit into /dev/shm, and with what tasks may have into the container."""
    pod, start = group["template"]["spec"], group["rayStartParams"]
    container = pod["containers"][0]
    (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    (volume,) = [each["emptyDir"] for each in pod["volumes"] if each["name"] == name]
    limit, shared = quantity(container["resources"]["limits"]["memory"]), quantity(volume["sizeLimit"])
    store, tasks = int(start["object-store-memory"]), int(start["memory"])
    if volume.get("medium") != "Memory" or store > shared:
        yield f"{container['name']}: an object store of {store} does not fit into /dev/shm"
    if store + tasks >= limit or shared >= limit:
        yield f"{container['name']}: object store, shared memory and memory of tasks exceed the container's {limit:.0f}"


def check_ports(doc: Doc, docs: list[Doc]) -> Iterator[str]:
    if doc["kind"] == "Service":
        pods = [
            template
            for each in docs
            for template in pod_templates(each)
            if doc["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        ]
        if not pods:
            yield f"Service {doc['metadata']['name']}: selects no pod"
        for pod in pods:
            offered = {p["name"]: p["containerPort"] for c in pod["spec"]["containers"] for p in c["ports"]}
            for port in doc["spec"]["ports"]:
                if offered.get(port["targetPort"]) != port["port"]:
                    yield f"Service {doc['metadata']['name']}: {port['targetPort']} is {offered}, not {port['port']}"
    services = {
        each["metadata"]["name"]: each["spec"]["ports"][0]["port"] for each in docs if each["kind"] == "Service"
    }
    for path, value in walk(doc):
        for host, port in re.findall(r"https?://([a-z0-9-]+):(\d+)", value) if isinstance(value, str) else ():
            if services.get(host) != int(port):
                yield f"{path}: no Service {host} with port {port}"


def check_serve(doc: Doc) -> Iterator[str]:
    """Serve's config is one that Serve reads; its application is that of a config that exists, at the same port."""
    if doc["kind"] != "RayService":
        return
    from ray.serve.schema import ServeDeploySchema

    from pipelines.config import load_config
    from pipelines.errors import UserError
    from pipelines.generation.config import ServeConfig

    raw = yaml.safe_load(doc["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(raw)
    (application,) = raw["applications"]
    if application["import_path"] != "jobs.serve_application:build":
        yield f"serveConfigV2: {application['import_path']} is not what the project offers"
    try:
        config = load_config(ServeConfig, application["args"]["config"], application["args"]["overrides"])
    except UserError as error:
        yield f"serveConfigV2: {error}"
        return
    if (config.host, config.port) != (schema.http_options.host, schema.http_options.port):
        yield "serveConfigV2: http_options and the application's host and port differ"
    if not config.is_loopback and "LUMOS_SERVE_TOKEN" not in {each["name"] for each in environment(doc)}:
        yield "serveConfigV2: listens to others, and no container has LUMOS_SERVE_TOKEN"
    for container in containers(doc):
        if config.port not in {port["containerPort"] for port in container["ports"]}:
            yield f"{container['name']}: does not name the port {config.port}"


def check_operator_rules(doc: Doc, gates: set[str], ray_version: str) -> Iterator[str]:
    """What KubeRay's operator and Kueue refuse, or do wrong, though the schema takes it."""
    cluster = ray_cluster(doc)
    if cluster is None:
        return
    if cluster.get("rayVersion") != ray_version:
        yield f"rayVersion {cluster.get('rayVersion')} is not that of the image, {ray_version}"
    if cluster.get("authOptions", {}).get("mode") != "token" or "networkPolicy" not in cluster:
        yield "no token, or no network policy"
    head = cluster["headGroupSpec"]
    if cluster.get("workerGroupSpecs") and head["rayStartParams"].get("num-cpus") != "0":
        yield "the head does work although there are workers"
    used = {"RayClusterNetworkPolicy"} if "networkPolicy" in cluster else set()
    used |= {"GCSFaultToleranceEmbeddedStorage"} if "gcsFaultToleranceOptions" in cluster else set()
    used |= {"RayJobDeletionPolicy"} if "deletionStrategy" in doc["spec"] else set()
    if used - gates:
        yield f"operator-values.yaml does not switch on {sorted(used - gates)}"
    for template in pod_templates(doc):
        if template["spec"].get("restartPolicy") != "Never":
            yield "restartPolicy must be Never for autoscaler v2, and so that no pod comes back as another node"
        if template["spec"].get("enableServiceLinks") is not False:
            yield "enableServiceLinks: Services would set MLFLOW_PORT and the like"
    if doc["kind"] == "RayJob":
        yield from _check_job(doc)


def _check_job(doc: Doc) -> Iterator[str]:
    spec = doc["spec"]
    if len(doc["metadata"]["name"]) > 47:
        yield "the name is longer than KubeRay takes"
    yield from check_deletion(spec)
    if not spec.get("backoffLimit"):
        yield "backoffLimit: a lost head would end the job"
    if "kueue.x-k8s.io/queue-name" not in doc["metadata"]["labels"]:
        yield "no queue"
    if not spec.get("shutdownAfterJobFinishes") or spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
        yield "Kueue takes jobs that delete their cluster when they end, of clusters of a set size"


def check_deletion(spec: Doc) -> Iterator[str]:
    """The rules that KubeRay's definition writes as CEL, and its operator's."""
    strategy = spec["deletionStrategy"]
    legacy = {"onSuccess", "onFailure"} & set(strategy)
    if strategy.get("deletionRules") and (spec.get("shutdownAfterJobFinishes") or legacy):
        yield "deletionRules exclude shutdownAfterJobFinishes, onSuccess and onFailure"
    if not strategy.get("deletionRules") and len(legacy) < 2:
        yield "deletionStrategy wants onSuccess and onFailure, or deletionRules"
    for rule in strategy.get("deletionRules", ()):
        if len({"jobStatus", "jobDeploymentStatus"} & set(rule.get("condition", {}))) != 1:
            yield "a rule wants one of jobStatus and jobDeploymentStatus"


def demand(doc: Doc) -> Counter:
    """What the pods of a job ask for at once."""
    total: Counter = Counter()
    for group, count in groups(ray_cluster(doc)):
        for name, value in group["template"]["spec"]["containers"][0]["resources"]["requests"].items():
            total[name] += count * quantity(value)
    for name, value in doc["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["resources"]["requests"].items():
        total[name] += quantity(value)
    return total


def feature_gates() -> set[str]:
    values = yaml.safe_load((FOLDER / "operator-values.yaml").read_text())
    return {gate["name"] for gate in values["featureGates"] if gate["enabled"]}


def pinned(package: str) -> str:
    lines = (ROOT / "infra" / "constraints.txt").read_text().splitlines()
    (version,) = [line.partition("==")[2] for line in lines if line.startswith(f"{package}==")]
    return version


def check(doc: Doc, docs: list[Doc]) -> list[str]:
    """All that is wrong with an object, among all the others."""
    found = [
        *check_images(doc),
        *check_commands(doc),
        *check_environment(doc),
        *check_references(doc, docs),
        *check_resources(doc),
        *check_ports(doc, docs),
        *check_serve(doc),
        *check_operator_rules(doc, feature_gates(), pinned("ray")),
    ]
    if missing := secret_references([doc]) - readme_secrets(README):
        found.append(f"the README does not say how to make the Secrets {sorted(missing)}")
    return found
