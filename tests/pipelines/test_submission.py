import importlib
import json
import os
import socket
import subprocess
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import get_args, get_type_hints

import click
import pytest
import yaml
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError, RpcError

from pipelines.config import CONFIG_DIR, check_expected, shipped_configs
from pipelines.errors import JobError, UserError
from pipelines.submission import follow, submit
from pipelines.submission.bundle import bundle, choose_project
from pipelines.submission.log_view import LogView
from pipelines.submission.request import CONFIG_FILE, CONFIG_PLACES, VERBS, Request, read_request, with_places
from pipelines.submission.secrets import carried_variables, looks_secret, refuse_secrets


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else one of this user would be taken up, for all later tests


def read(verb, *arguments):
    return read_request(verb, importlib.import_module(f"jobs.{verb}").command, arguments)


# Texts of configs that are no places, by the last part of their keys.
NOT_PLACES = {
    "api_key_env", "caption_column", "captioners", "device", "experiment", "extensions", "host", "languages", "model",
    "path_column", "prompt", "prompts", "run_name", "scratch", "sizes", "split", "token", "url",
}  # fmt: skip


def text_keys(cls, prefix=""):
    """Every key of a config that may hold text, lists and tables of texts included."""
    for name, hint in get_type_hints(cls).items():
        if name.isupper():
            continue
        yield from texts_of(hint, f"{prefix}{name}")


def texts_of(hint, key):
    if hint is str:
        yield key
    elif hasattr(hint, "__dataclass_fields__"):
        yield from text_keys(hint, f"{key}.")
    else:
        inner = [part for part in get_args(hint) if not isinstance(part, str)]  # a Literal's are its values
        many = getattr(hint, "__origin__", None) in (tuple, dict, list)
        for part in inner:
            yield from texts_of(part, f"{key}.*" if many and hasattr(part, "__dataclass_fields__") else key)


@pytest.mark.parametrize("verb", CONFIG_PLACES)
def test_every_text_in_a_config_is_known_as_a_place_or_not(verb):
    from pipelines.data.config import CurateConfig
    from pipelines.generation.config import GenerateConfig, ServeConfig
    from pipelines.training.config import TrainConfig

    cls = {"curate": CurateConfig, "train": TrainConfig, "generate": GenerateConfig, "serve": ServeConfig}[verb]
    keys = set(text_keys(cls))
    places = {key.removesuffix(".*") for key in CONFIG_PLACES[verb]}
    assert places <= keys
    unknown = {key for key in keys - places if key.rpartition(".")[2] not in NOT_PLACES}
    assert not unknown, "name them in CONFIG_PLACES, or in NOT_PLACES here"


@pytest.mark.parametrize("verb", CONFIG_PLACES)
def test_the_job_reads_the_very_config_that_was_checked(verb, tmp_path):
    given = {"generate": ["model=m", "prompts=[p]"], "serve": ["model=m"]}.get(verb, [])
    for name in shipped_configs(verb):
        request = read(verb, name, *given)
        (tmp_path / "sent.yaml").write_text(request.files[CONFIG_FILE])
        assert read(verb, str(tmp_path / "sent.yaml")).config == request.config
        assert request.entrypoint == f"python -m jobs.cli {verb} {CONFIG_FILE}"


def test_overrides_options_and_run_options_go_along():
    request = read("generate", "--model", "s3://b/m", "--prompt", "a red square", "--seed", "7", "sampling.num_steps=2")
    assert request.config["model"] == "s3://b/m"
    assert request.config["prompts"] == ["a red square"]
    assert (request.config["seed"], request.config["sampling"]["num_steps"]) == (7, 2)
    assert read("train", "demo", "--dry-run").entrypoint == f"python -m jobs.cli train {CONFIG_FILE} --dry-run"


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("train", ["nosuch"], "config 'nosuch' is neither a file nor a shipped train config"),
        ("train", ["demo", "steps=-1"], "steps must be at least 1, got -1"),
        ("train", ["demo", "lr=1"], "did you mean 'optimizer.lr'?"),
        ("curate", ["default", "captions.requrie=true"], "did you mean 'captions.require'?"),
        ("export", ["s3://b/run@3"], "export: name OUT"),
    ],
)
def test_what_is_wrong_in_a_config_is_told_in_the_words_of_the_verb(verb, arguments, message):
    with pytest.raises(UserError) as told:
        read(verb, *arguments)
    assert message in str(told.value)


def test_bad_usage_of_a_verb_is_bad_usage_here():
    with pytest.raises(click.UsageError, match="No such option"):
        read("evaluate", "folder", "--nosuch", "1")
    with pytest.raises(click.UsageError, match="is not in the range"):
        read("generate", "--frames", "0")


def test_local_places_are_refused_by_name_unless_they_are_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remote = ["data.dataset=s3://b/data", "output=s3://b/run"]
    sent = with_places(read("train", "demo", *remote), here=False, shared=False, where="the cluster")
    assert sent.config["output"] == "s3://b/run"
    assert sent.config["deepspeed"] == "zero1"  # a name, not a path
    for key, value in {
        "init_from": "models/first",
        "checkpoint.storage": "/scratch/run",
        "tracking.uri": "sqlite:///runs.db",
        "samples.clip": "{weights: clip.pt}",
        "deepspeed": "mine.json",
    }.items():
        request = read("train", "demo", *remote, f"{key}={value}")
        with pytest.raises(UserError, match=rf"^{key}.*is a path of this machine, which the cluster does not.*s3://"):
            with_places(request, here=False, shared=False, where="the cluster")
        with_places(request, here=False, shared=True, where="the cluster")
    sources = "data={sources: [{dataset: s3://b/one}, {dataset: two}], vocabulary: compact}"
    with pytest.raises(UserError, match=r"^models\.v1\.5: b/m is a path"):
        with_places(
            read("serve", "--model", "s3://b/m", 'models={"v1.5": b/m}', "jobs=s3://b/j"),
            here=False,
            shared=False,
            where="x",
        )
    shared = with_places(read("train", "demo", sources, "output=run"), here=False, shared=True, where="the cluster")
    assert [each["dataset"] for each in shared.config["data"]["sources"]] == ["s3://b/one", str(tmp_path / "two")]
    assert shared.config["output"] == str(tmp_path / "run")
    assert shared.config["cluster"]["shared_paths"] is True  # else the verb would refuse them there
    said = read("train", "demo", "data.dataset=d", "output=run", "cluster.shared_paths=true")
    assert with_places(said, here=False, shared=False, where="x").config["output"] == str(tmp_path / "run")
    here = with_places(read("train", "demo", "data.dataset=d", "output=run"), here=True, shared=False, where="x")
    assert here.config["output"] == str(tmp_path / "run")


def test_places_of_verbs_without_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = read("evaluate", "s3://b/videos", "here", "--out", "s3://b/out", "--device", "cpu", "--run", "first")
    with pytest.raises(UserError, match="FOLDERS: here is a path of this machine"):
        with_places(request, here=False, shared=False, where="the cluster")
    sent = with_places(request, here=False, shared=True, where="the cluster").arguments
    assert sent[0] == "folders"
    assert sent[-2:] == ("s3://b/videos", str(tmp_path / "here"))
    assert "s3://b/out" in sent
    with pytest.raises(UserError, match="--out: lumos-demo is a path"):
        with_places(read("demo"), here=False, shared=False, where="the cluster")
    export = with_places(read("export", "runs/a@3", "m", "--ema"), here=False, shared=True, where="the cluster")
    assert export.arguments == ("--ema", str(tmp_path / "runs" / "a@3"), str(tmp_path / "m"))
    imported = read("evaluate", "import", "s3://b/results.json", "--benchmark", "vbench")
    assert imported.entrypoint == "python -m jobs.cli evaluate import --benchmark vbench s3://b/results.json"


def test_no_option_of_a_verb_has_a_name_that_submit_takes_itself():
    def options(command):
        own = {text for each in command.params for text in each.opts + each.secondary_opts if text.startswith("-")}
        return own.union(*(options(each) for each in getattr(command, "commands", {}).values()))

    taken = options(importlib.import_module("jobs.submit").command)
    for verb in VERBS:
        assert not taken & options(importlib.import_module(f"jobs.{verb}").command)


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "x",
    "MLFLOW_TRACKING_PASSWORD": "x",
    "LUMOS_SERVE_TOKEN": "x",
    "OPENAI_API_KEY": "x",
    "STORE": "https://user:hunter2@host/path",
    "SIGNED": "https://b.s3.amazonaws.com/v.csv?X-Amz-Expires=60&X-Amz-Signature=0f3c",
    "OTHER": "hf_abcdefghijklmnopqrstu",
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_does_not_go_along_and_is_not_repeated(name):
    value = SECRETS[name] if SECRETS[name] != "x" else "planted-value-17"
    for given, environment in (([name], {name: value}), ([f"{name}={value}"], {})):
        with pytest.raises(UserError, match=f"--env {name}: it looks like a secret.*cluster's own processes") as told:
            carried_variables(given, environment)
        assert value not in str(told.value)


def test_variables_are_carried_by_name_and_none_unasked_but_those_that_configs_depend_on():
    environment = {"LUMOS_SCORES": "mine", "AWS_REGION": "eu", "AWS_ENDPOINT_URL": "http://here", "HOME": "/root"}
    assert carried_variables([], environment) == {"LUMOS_SCORES": "mine"}
    assert carried_variables(["AWS_REGION", "A=b=c"], environment) == {
        "LUMOS_SCORES": "mine",
        "AWS_REGION": "eu",
        "A": "b=c",
    }
    for bad, message in (("NOSUCH", "is not set here"), ("a b=1", "expected NAME"), ("RAY_AUTH_TOKEN=x", "itself")):
        with pytest.raises(UserError, match=message):
            carried_variables([bad], environment)


def test_secrets_in_configs_and_on_command_lines_are_refused():
    with pytest.raises(UserError, match=r"^token: it holds a secret") as told:
        read("serve", "--model", "s3://b/m", "token=planted-value-17")
    assert "planted" not in str(told.value)
    with pytest.raises(UserError, match=r"^tracking\.uri: it holds a secret"):
        read("train", "demo", "tracking.uri=https://me:planted@mlflow.example")
    for given in (["s3://b/v", "--tracking-uri", "https://me:planted@mlflow.example"], ["https://me:planted@store/v"]):
        with pytest.raises(UserError, match=r"^(--tracking-uri|argument \d): it holds a secret") as told:
            read("evaluate", *given)
        assert "planted" not in str(told.value)


def test_the_words_of_a_prompt_are_no_secret():
    assert looks_secret("x", "Authorization: Bearer 0123456789abcdef0123456789abcdef")
    assert not looks_secret("prompts", "The Bearer carrying a flag walks by; is it true? sig=no")


class LossyClient:
    """A cluster that takes a job, whose answers to that are lost."""

    def __init__(self, *, says):
        self.jobs, self.says = [], says

    def submit_job(self, *, submission_id):
        if submission_id in self.jobs:
            raise RuntimeError(f"status code 500: ValueError: Job with submission_id {submission_id} already exists.")
        if self.says != "nothing for ever":
            self.jobs.append(submission_id)
        raise ConnectionError("read timed out")

    def job(self, job_id):
        if self.says == "later" and job_id in self.jobs:
            return SimpleNamespace(submission_id=job_id)
        raise ConnectionError("read timed out")


@pytest.mark.parametrize("says", ["later", "only that it exists"])
def test_a_job_that_was_taken_is_not_said_to_be_refused(monkeypatch, says):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    client = LossyClient(says=says)
    assert submit._submit(client, {"submission_id": "first-1"}) == "first-1"
    assert client.jobs == ["first-1"]


def test_a_job_that_may_have_been_taken_is_named(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(JobError, match=r"did not take the job, or did not say so: .*`lumos jobs list` has first-1"):
        submit._submit(LossyClient(says="nothing for ever"), {"submission_id": "first-1"})


def test_a_home_folder_is_the_one_of_this_machine(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    request = Request(verb="train", config={"output": "~/run", "data": {"dataset": "data"}})
    config = with_places(request, here=True, shared=False, where="a cluster").config
    assert (config["output"], config["data"]["dataset"]) == ("/home/me/run", os.path.abspath("data"))


class StoppingClient:
    """A cluster whose job stops, and that does not answer for a while."""

    def __init__(self, error, *, drops):
        self.error, self.drops, self.asked = error, drops, 0

    def stop_job(self, job_id):
        pass

    def job(self, job_id):
        self.asked += 1
        if 1 < self.asked <= 1 + self.drops:
            raise self.error
        details = {"type": "SUBMISSION", "entrypoint": "x", "submission_id": job_id}
        return JobDetails(**details, status="STOPPED" if self.asked > 1 else "RUNNING")


def test_a_dropped_connection_does_not_end_the_wait_for_a_job_that_stops(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    end = follow.stop(StoppingClient(ConnectionError("reset"), drops=3), "first-1", lambda _: None)
    assert end.status == "stopped"
    monkeypatch.setattr(follow, "_STOP_PATIENCE_S", -1)
    for error in (ConnectionError("reset"), AuthenticationError("Invalid token")):
        with pytest.raises(JobError, match=r"job first-1: .*`lumos jobs list` says"):
            follow.stop(StoppingClient(error, drops=9), "first-1", lambda _: None)


def test_secrets_below_a_key_that_is_named_so_are_refused():
    for values in ({"token": ["hunter2"]}, {"api_key": {"value": "hunter2"}}, {"url": "https://hunter2@host/x"}):
        with pytest.raises(UserError, match="holds a secret"):
            refuse_secrets(values, [])


def test_no_key_or_value_of_shipped_configs_looks_secret():
    for path in CONFIG_DIR.glob("*/*.yaml"):
        text = path.read_text()
        assert not looks_secret("x", text), path
        assert not [key for key in yaml.safe_load(text) if looks_secret(key, "")], path


def test_the_upload_holds_the_project_and_the_config_and_nothing_else(tmp_path):
    with bundle("upload", {CONFIG_FILE: "a: 1\n"}) as folder:
        top = {path.name for path in folder.iterdir()}
        assert top == {"lumos", "pipelines", "jobs", "infra", "pyproject.toml", CONFIG_FILE}
        names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc") or "/." in name]
        assert {"jobs/cli.py", "infra/configs/train/demo.yaml", "lumos/py.typed"} <= set(names)
        printed = subprocess.run(
            ["python", "-m", "jobs.cli", "--help"], cwd=folder, capture_output=True, text=True, check=True
        )
        assert "submit" in printed.stdout
    assert not folder.exists()
    with bundle("installed", {CONFIG_FILE: "a: 1\n"}) as folder:
        assert [path.name for path in folder.iterdir()] == [CONFIG_FILE]
    with (
        pytest.raises(UserError, match=r"more than 0\.1: move the largest files.*MB\)"),
        bundle("upload", {}, most_mb=0.1),
    ):
        pass
    assert (choose_project("auto"), choose_project("installed")) == ("upload", "installed")


def test_a_job_of_installed_code_refuses_another_version_or_commit(monkeypatch):
    from importlib.metadata import version

    from pipelines.config import provenance

    here, commit = version("lumos-ray"), provenance()["git_commit"]
    for fine in (f"{here} {commit}", f"{here} unknown", here):
        monkeypatch.setenv("LUMOS_EXPECTED", fine)
        check_expected()
    for bad in (f"9.9.9 {commit}", f"{here} 0123456789abcdef"):
        monkeypatch.setenv("LUMOS_EXPECTED", bad)
        with pytest.raises(UserError, match=f"the cluster has {here}"):
            check_expected()


BAR = "split:  {percent}%|███▌      | {done}/20 [00:0{done}<00:10,  1.90row/s]"


def test_bars_keep_to_one_line_on_a_terminal_and_to_a_few_in_a_file():
    text = "begin\n" + "".join("\n" + BAR.format(percent=5 * n, done=n) for n in range(1, 9)) + "\nsnapshot x\nend"
    shown = []
    view = LogView(shown.append, terminal=True)
    for at in range(0, len(text), 7):
        view.feed(text[at : at + 7])
    view.close()
    lines = "".join(shown).split("\n")
    assert lines[0] == "begin"
    assert lines[2].split("\r\x1b[K")[-1] == BAR.format(percent=40, done=8)
    assert lines[3:] == ["snapshot x", "end", ""]
    plain = []
    view = LogView(plain.append, terminal=False, clock=lambda: 0.0)
    view.feed(text)
    view.close()
    first, last = BAR.format(percent=5, done=1), BAR.format(percent=40, done=8)
    assert "".join(plain) == f"begin\n\n{first}\n{last}\nsnapshot x\nend\n"


class OtherDashboard(BaseHTTPRequestHandler):
    """Answers as the dashboard of a cluster of other versions; the real one has those of this process."""

    versions = ("2.40.0", "3.9.18")
    asked: list[str] = []  # noqa: RUF012
    nodes: dict[str, dict] = {}  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        data = {"/api/version": {"version": "4", "ray_version": self.versions[0]}}
        data |= self.nodes
        data["/api/v0/cluster_metadata"] = {"result": True, "data": {"pythonVersion": self.versions[1]}}
        body = json.dumps(data.get(self.path, {})).encode()
        self.send_response(200 if self.path in data else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def other_dashboard():
    OtherDashboard.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), OtherDashboard)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("versions", [("2.40.0", "3.9.18"), None])
def test_other_versions_are_named_on_both_sides_before_anything_is_uploaded(other_dashboard, monkeypatch, versions):
    import platform

    import ray

    from pipelines.submission.client import open_client
    from pipelines.submission.submit import Options, submit

    monkeypatch.setattr(OtherDashboard, "versions", versions or (ray.__version__, "3.9.18"))
    there = f"Ray {OtherDashboard.versions[0]} on Python 3.9.18"
    here = f"Ray {ray.__version__} on Python {platform.python_version()}"
    with pytest.raises(UserError, match=f"runs {there}, here is {here}: they must be the same"):
        submit(open_client(other_dashboard), read("demo"), Options(variables={}))
    assert not [path for path in OtherDashboard.asked if "packages" in path or "jobs" in path]


@pytest.mark.parametrize(
    ("ip", "name", "here"), [("127.0.0.1", None, True), ("10.244.0.5", None, False), ("127.0.0.1", "pod", False)]
)
def test_a_forwarded_port_does_not_make_a_cluster_this_machine(other_dashboard, monkeypatch, ip, name, here):
    from pipelines.submission.client import is_this_machine, open_client

    nodes = [{"node_ip": "192.0.2.9", "state": "DEAD"}, {"node_ip": ip, "state": "ALIVE"}]
    answers = {
        "/api/v0/nodes": {"data": {"result": {"result": nodes}}},
        "/nodes?view=hostNameList": {"data": {"hostNameList": [name or socket.gethostname()]}},
    }
    monkeypatch.setattr(OtherDashboard, "nodes", answers)
    assert is_this_machine(open_client(other_dashboard)) is here


def test_addresses_where_no_cluster_is(other_dashboard, monkeypatch):
    from pipelines.submission.client import open_client

    for address in ("http://127.0.0.1:9", "127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(UserError, match=f"{address}: .*--address"):
            open_client(address)
    with pytest.raises(UserError, match="not the dashboard of a Ray cluster"):
        open_client(f"{other_dashboard}/elsewhere")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9: nobody answers there"):
        open_client(None)
    assert "RAY_API_SERVER_ADDRESS" in os.environ


def test_a_port_that_speaks_otherwise_is_told_in_a_line(monkeypatch):
    """As Ray does of the dashboard's port without http://, after 40 s."""
    from pipelines.submission import client

    def answer(address):
        raise RpcError("Timed out while waiting for GCS to become available.", rpc_code=4)

    monkeypatch.setattr(client, "_knock", lambda _: None)
    monkeypatch.setattr(client, "JobClient", answer)
    with pytest.raises(
        UserError, match=r"^127\.0\.0\.1:8265: what answers there is not a Ray cluster .*http://HOST:8265$"
    ):
        client.open_client("127.0.0.1:8265")


def test_a_password_in_an_address_is_not_repeated():
    from pipelines.submission.client import open_client

    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:9: nobody") as told:
        open_client("http://me:planted@127.0.0.1:9")
    assert "planted" not in str(told.value)


def test_names_of_jobs():
    from pipelines.submission.submit import Options

    with pytest.raises(UserError, match="--name a/b: use up to 63 letters"):
        Options(name="a/b", variables={})
