"""The manifests for KubeRay: against its schemas where these are at hand, and always against the project itself."""

import re
from copy import deepcopy
from importlib import util
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from tests.infra import crds
from tests.infra import manifests as m
from tests.infra.commands import check_command, commands_in

MANIFESTS = m.load_manifests()
DOCS = [doc for docs in MANIFESTS.values() for doc in docs]
IDS = [f"{name}:{doc['kind']}-{doc['metadata']['name']}" for name, docs in MANIFESTS.items() for doc in docs]
RAY_DOCS = [doc for doc in DOCS if doc["apiVersion"] == "ray.io/v1"]


def find(kind: str, name: str = "lumos") -> m.Doc:
    (doc,) = [each for each in DOCS if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return deepcopy(doc)


def merged(doc, patch):
    """A JSON merge patch, as `kubectl patch --type merge` applies it."""
    if not isinstance(patch, dict):
        return patch
    base = doc if isinstance(doc, dict) else {}
    return {**base, **{key: merged(base.get(key), value) for key, value in patch.items()}}


def schema_errors(doc: m.Doc, folder: Path) -> list[str]:
    if doc["apiVersion"].startswith("ray.io/"):
        version = doc["apiVersion"].partition("/")[2]
        return crds.errors(doc, crds.resource_schema(folder, doc["kind"], version))
    return [found for each in m.pod_templates(doc) for found in crds.errors(each, crds.pod_template_schema(folder))]


def test_there_is_every_manifest():
    jobs = {f"rayjob-{verb}.yaml" for verb in ("curate", "train", "generate", "evaluate")}
    assert jobs | {"raycluster.yaml", "rayservice.yaml", "mlflow.yaml", "queue.yaml", "namespace.yaml"} <= set(
        MANIFESTS
    )
    assert all(doc["metadata"].get("namespace", "lumos") == "lumos" for doc in DOCS)


@pytest.mark.parametrize("doc", DOCS, ids=IDS)
def test_manifest_is_as_the_schemas_say(doc):
    assert schema_errors(doc, crds.crd_dir()) == []


def test_patched_service_is_as_the_schema_says():
    patch = yaml.safe_load((m.FOLDER / "rayservice-incremental.yaml").read_text())
    doc = merged(find("RayService"), patch)
    assert doc["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    assert doc["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"], "the operator refuses that upgrade without"
    assert "RayServiceIncrementalUpgrade" in m.feature_gates()
    assert schema_errors(doc, crds.crd_dir()) == []


@pytest.mark.parametrize("doc", DOCS, ids=IDS)
def test_manifest_fits_the_project(doc):
    assert m.check(doc, DOCS) == []


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("spec.rayClusterSpec.headGroupSpecs", {}, "headGroupSpecs"),
        ("spec.backofLimit", 3, "backofLimit"),
        ("spec.backoffLimit", "3", "'3' is not of type"),
        ("spec.deletionStrategy.onFailure.policy", "DeleteHead", "DeleteHead"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resource", {}, "resource"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.volumes.0.emptyDir.sizeLimit", [1], "is not of type"),
        ("spec.rayClusterSpec.networkPolicy.mode", "DenyNothing", "DenyNothing"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplica", 2, "maxReplica"),
    ],
)
def test_planted_error_of_form_is_told(place, value, told):
    doc = plant(find("RayJob", "lumos-train"), place, value)
    assert told in "\n".join(schema_errors(doc, crds.crd_dir()))


def test_schema_takes_numbers_for_quantities_and_unknown_keys_where_it_says_so():
    schema = crds.strict(
        {
            "type": "object",
            "properties": {
                "cpu": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
                "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
                "properties": {"type": "string", "nullable": True},
            },
        }
    )
    assert crds.errors({"cpu": 1, "free": {"any": 1}, "properties": None}, schema) == []
    assert crds.errors({"cpu": "500m"}, schema) == []
    assert len(crds.errors({"cpu": 0.5}, schema)) == 1
    assert len(crds.errors({"cpus": 1}, schema)) == 1


def plant(doc: m.Doc, place: str, value) -> m.Doc:
    """The object with one value changed or added."""
    *parents, last = place.split(".")
    holder = doc = deepcopy(doc)
    for key in parents:
        holder = holder[int(key) if isinstance(holder, list) else key]
    if isinstance(holder, list):
        holder[int(last)] = value
    else:
        holder[last] = value
    return doc


HEAD = "spec.rayClusterSpec.headGroupSpec"
CONTAINER = f"{HEAD}.template.spec.containers.0"


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("spec.entrypoint", "lumos train demo data.datasets=s3://BUCKET/dataset", "datasets"),
        ("spec.entrypoint", "lumos train demo2 output=s3://BUCKET/runs", "demo2"),
        ("spec.entrypoint", "lumos train demo steps=-1", "steps"),
        ("spec.entrypoint", "lumos trian demo", "no verb trian"),
        ("spec.entrypoint", "lumos train demo --dryrun", "--dryrun"),
        ("spec.entrypoint", "lumos evaluate s3://BUCKET/videos --ouput x", "--ouput"),
        ("spec.entrypoint", "lumos train demo samples.prompts=['a']", "shell would change"),
        ("spec.entrypoint", "python jobs/train.py demo", "no such command"),
        ("spec.entrypoint", "lumos train demo tracking.uri=http://mlflow:5001", "no Service mlflow with port 5001"),
        ("spec.entrypoint", "lumos train demo tracking.uri=http://me:secret@mlflow:5000", "password within"),
        (f"{CONTAINER}.image", "REGISTRY/lumos-ray:latest", "is none of"),
        (f"{CONTAINER}.env.0", {"name": "AWS_ACCES_KEY_ID", "value": "x"}, "nothing is known to read"),
        (f"{CONTAINER}.env.1", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "plain text"),
        (
            f"{CONTAINER}.env.1.valueFrom.secretKeyRef",
            {"name": "lumos-s3", "key": "secret"},
            "does not say how to make the Secrets [('lumos-s3', 'secret')]",
        ),
        (f"{CONTAINER}.env.2.valueFrom.configMapKeyRef.key", "regoin", "no ConfigMap lumos with regoin"),
        (f"{CONTAINER}.resources.requests", {"cpu": "1", "memory": "8Gi"}, "must be there, and equal"),
        (f"{CONTAINER}.volumeMounts.1.name", "scrap", "no volume ['scrap']"),
        (f"{CONTAINER}.volumeMounts.1.name", "scrap", "nobody mounts ['scratch']"),
        (f"{HEAD}.rayStartParams.object-store-memory", str(3 * 2**30), "does not fit into /dev/shm"),
        (f"{HEAD}.rayStartParams.memory", str(7 * 2**30), "exceed"),
        (f"{HEAD}.rayStartParams.num-cpus", "2", "the head does work"),
        (f"{HEAD}.template.spec.restartPolicy", "Always", "restartPolicy"),
        (f"{HEAD}.template.spec.enableServiceLinks", True, "MLFLOW_PORT"),
        ("spec.rayClusterSpec.rayVersion", "2.59.0", "not that of the image"),
        ("spec.rayClusterSpec.authOptions.mode", "disabled", "no token"),
        ("spec.rayClusterSpec.authOptions.secretName", "other", "[('other', 'auth_token')]"),
        ("spec.rayClusterSpec.enableInTreeAutoscaling", True, "set size"),
        ("spec.deletionStrategy.deletionRules", [{"policy": "DeleteCluster"}], "exclude"),
        ("spec.deletionStrategy.deletionRules", [{"policy": "DeleteCluster"}], "one of jobStatus"),
        ("spec.deletionStrategy", {"onSuccess": {"policy": "DeleteCluster"}}, "wants onSuccess and onFailure"),
        ("spec.shutdownAfterJobFinishes", False, "Kueue takes"),
        ("spec.backoffLimit", 0, "lost head"),
        ("metadata.labels", {}, "no queue"),
    ],
)
def test_planted_error_is_told(place, value, told):
    assert told in "\n".join(m.check(plant(find("RayJob", "lumos-train"), place, value), DOCS))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("port: 8000", "port: 8001"), "differ"),
        (("replicas.threads", "replicas.thread"), "thread"),
        (("jobs.serve_application:build", "jobs.serve:build"), "not what the project offers"),
    ],
)
def test_planted_error_of_the_service_is_told(change, told):
    doc = find("RayService")
    doc["spec"]["serveConfigV2"] = doc["spec"]["serveConfigV2"].replace(*change)
    assert told in "\n".join(m.check(doc, DOCS))


@pytest.mark.parametrize(
    ("kind", "place", "value", "told"),
    [
        ("Deployment", "spec.template.spec.containers.0.args.1", "serve", "serve"),
        ("Deployment", "spec.template.spec.containers.0.args.2", "--app=basic-auth", "--app"),
        ("Deployment", "spec.template.spec.containers.0.volumeMounts.0.mountPath", "/etc/auth", "is not mounted"),
        ("Service", "spec.ports.0.port", 5001, "5001"),
        ("Service", "spec.selector", {"app.kubernetes.io/name": "ml"}, "selects no pod"),
    ],
)
def test_planted_error_of_mlflow_is_told(kind, place, value, told):
    assert told in "\n".join(m.check(plant(find(kind, "mlflow"), place, value), DOCS))


def test_variables_are_read_by_who_is_said_to_read_them():
    for name, reader in m.READERS.items():
        if reader == "code":
            paths = [path for folder in ("lumos", "pipelines", "jobs") for path in (m.ROOT / folder).rglob("*.py")]
            assert any(name in path.read_text() for path in paths), name
        elif not reader.startswith("in words"):
            package, _, file = reader.partition("/")
            (folder,) = util.find_spec(package).submodule_search_locations
            assert f'"{name}"' in (Path(folder) / file).read_text().replace("'", '"'), name
    used = {variable["name"] for doc in DOCS for variable in m.environment(doc)}
    assert used == set(m.READERS), "a variable that no manifest sets any more"


def test_secrets_of_the_readme_are_those_that_manifests_ask_for():
    assert m.readme_secrets(m.README) == m.secret_references(DOCS)


def with_rules_of_the_readme() -> m.Doc:
    """A job without Kueue, as the README says to change it."""
    doc = find("RayJob", "lumos-train")
    del doc["spec"]["shutdownAfterJobFinishes"], doc["metadata"]["labels"]
    (block,) = re.findall(r"^    deletionStrategy:\n(?:      .*\n)+", m.README, re.MULTILINE)
    doc["spec"].update(yaml.safe_load(dedent(block)))
    return doc


def test_deletion_rules_of_the_readme_are_good():
    doc = with_rules_of_the_readme()
    assert [rule["condition"]["jobStatus"] for rule in doc["spec"]["deletionStrategy"]["deletionRules"]]
    assert list(m.check_deletion(doc["spec"])) == []


def test_deletion_rules_of_the_readme_are_as_the_schema_says():
    assert schema_errors(with_rules_of_the_readme(), crds.crd_dir()) == []


def test_readme_names_every_file_and_files_that_are_there():
    named = set(re.findall(r"`?((?:[a-z]+-)*[a-z{},]+\.yaml)`?", m.README))
    names = {name for each in named for name in expand(each)}
    assert names == {path.name for path in m.FOLDER.glob("*.yaml")}


def expand(name: str) -> list[str]:
    """A name with one group in braces, as shells read it."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return [found[1] + each + found[3] for each in found[2].split(",")] if found else [name]


def test_commands_in_comments_are_good():
    texts = [path.read_text() for path in (m.ROOT / "infra" / "cluster").rglob("*.yaml")]
    commands = [command for text in texts for command in commands_in(text)]
    assert len(commands) >= 2
    assert [told for command in commands for told in check_command(command)] == []


def test_jobs_of_the_demo_fit_the_queue():
    quota = {
        each["name"]: m.quantity(each["nominalQuota"])
        for each in find("ClusterQueue")["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    }
    assert find("LocalQueue")["spec"]["clusterQueue"] == "lumos"
    jobs = {doc["metadata"]["name"]: m.demand(doc) for doc in DOCS if doc["kind"] == "RayJob"}
    gpu = jobs.pop("lumos-train-gpu")
    for name, demand in jobs.items():
        assert all(demand[resource] <= quota[resource] for resource in demand), (name, demand)
    gpus, cpus, memory, disk = re.search(
        r"# (\d+) for rayjob-train-gpu.yaml, with (\d+) CPUs, (\d+Gi) and (\d+Gi)",
        (m.FOLDER / "queue.yaml").read_text(),
    ).groups()
    assert gpu["nvidia.com/gpu"] == int(gpus)
    assert gpu["cpu"] <= int(cpus)
    assert gpu["memory"] <= m.quantity(memory)
    assert gpu["ephemeral-storage"] <= m.quantity(disk)
    labels = {doc["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] for doc in DOCS if doc["kind"] == "RayJob"}
    assert labels == {find("LocalQueue")["metadata"]["name"]}


def test_replicas_of_the_service_are_on_different_nodes():
    spec = find("RayService")["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert {each["name"]: each["max_replicas_per_node"] for each in application["deployments"]} == {
        "api": 1,
        "generator": 1,
    }
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (rule,) = group["template"]["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert rule["labelSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    assert group["replicas"] >= 2


def test_clusters_do_not_share_a_head_service():
    """KubeRay names that of a RayService as that of a RayCluster, and turns one that is there over to its own head."""
    names = [doc["metadata"]["name"] for doc in DOCS if doc["kind"] in ("RayCluster", "RayService")]
    assert len(names) == len(set(names))
    comment = (m.FOLDER / "raycluster.yaml").read_text().partition("apiVersion")[0]
    assert f"service/{find('RayCluster', 'lumos-standing')['metadata']['name']}-head-svc" in comment


def test_standing_cluster_scales_both_kinds_of_nodes():
    spec = find("RayCluster", "lumos-standing")["spec"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cpu", "gpu"]
    assert all(group["minReplicas"] < group["maxReplicas"] for group in spec["workerGroupSpecs"])
