"""Kubernetes' custom resources against the schemas of their definitions, as an API server with strict validation."""

import os
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

VARIABLE = "LUMOS_CRD_DIR"


def crd_dir() -> Path:
    """The folder of the definitions; the test is skipped where none is named."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} names no folder of KubeRay's definitions (config/crd/bases in its repository)")
    return Path(os.environ[VARIABLE])


@cache
def resource_schema(folder: Path, kind: str, version: str) -> dict[str, Any]:
    """The schema of a kind, such as RayJob, with unknown fields refused."""
    text = (folder / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # a megabyte: C takes a tenth
    (schema,) = [
        entry["schema"]["openAPIV3Schema"]
        for entry in definition["spec"]["versions"]
        if entry["name"] == version and entry["served"]
    ]
    return strict(schema)


def pod_template_schema(folder: Path) -> dict[str, Any]:
    """The schema of a pod template, which KubeRay's definitions hold whole."""
    schema = deepcopy(resource_schema(folder, "RayCluster", "v1"))
    template: dict[str, Any] = schema["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    return template


def strict(schema: Any) -> Any:
    """An OpenAPI schema of Kubernetes as JSON schema that refuses what an API server drops without a word."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        plain = {key: value for key, value in schema.items() if key not in ("type", "anyOf")}
        return {**plain, "type": ["integer", "string"]}
    result = {
        key: {name: strict(each) for name, each in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
    }
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if "properties" in schema and "additionalProperties" not in schema and not keeps:
        result["additionalProperties"] = False
    if schema.get("nullable"):
        result["type"] = [schema["type"], "null"]
    return result


def errors(instance: Any, schema: dict[str, Any]) -> list[str]:
    """What is wrong, each with its place."""
    found = sorted(Draft7Validator(schema).iter_errors(instance), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]
