"""Comparisons of runs in a real MLflow store, written through its own client."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from pipelines.errors import UserError
from pipelines.evaluation.compare import report
from pipelines.evaluation.compare.figures import Figure, as_json, compare_runs, run_cost
from pipelines.evaluation.compare.report import as_text, figure_text, write_report
from pipelines.evaluation.compare.runs import RunStore

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 32,
}
STEPS = 40


def loss(lr: float, seed: int, step: int) -> float:
    return 1.0 + 3.0 * np.exp(-lr * 20 * step) + 0.01 * seed


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An experiment of three runs, two of which differ in the seed alone, and another experiment that is empty."""
    folder = tmp_path_factory.mktemp("store")
    client = MlflowClient(f"sqlite:///{folder}/mlruns.db")
    home = client.create_experiment("lr", (folder / "artifacts").as_uri())
    client.create_experiment("empty", (folder / "artifacts").as_uri())
    for name, lr, seed in (("fast-0", 0.01, 0), ("fast-1", 0.01, 1), ("slow-0", 0.001, 0)):
        run = client.create_run(home, run_name=name)
        params = {
            "optimizer.lr": lr,
            "seed": seed,
            "output": f"runs/{name}",
            "num_workers": 2,
            "tracking.run_name": name,
        }
        params |= {f"model.{key}": value for key, value in MODEL.items()}
        metrics = []
        for step in range(1, STEPS + 1):
            values = {"loss": loss(lr, seed, step), "step_seconds": 0.5, "tokens_per_s": 1000.0}
            values |= {f"loss_frame_{frame}": loss(lr, seed, step) + frame for frame in range(12)}
            values |= {"val/loss": 2 * loss(lr, seed, step)} if step % 20 == 0 else {}
            metrics += [Metric(key, float(value), 1000 * step, step) for key, value in values.items()]
        client.log_batch(
            run.info.run_id,
            metrics=metrics,
            params=[Param(key, str(value)) for key, value in params.items()],
            tags=[RunTag("num_parameters", "100000")],
        )
        for step in (20, 40, 60):
            drawn = folder / name / f"step-{step:08d}"
            drawn.mkdir(parents=True)
            (drawn / "00.mp4").write_bytes(b"a video")
            if step < 60:  # which is still being sent
                said = {"step": step, "prompts": ["a red ball"], "files": ["00.mp4"]}
                (drawn / "samples.json").write_text(json.dumps(said))
            client.log_artifacts(run.info.run_id, str(drawn), f"samples/{drawn.name}")
        client.set_terminated(run.info.run_id)
        output = folder / "runs" / name
        output.mkdir(parents=True)
        (output / "run.json").write_text(json.dumps({"run_id": run.info.run_id}))
        (output / "config.yaml").write_text(f"tracking:\n  uri: sqlite:///{folder}/mlruns.db\n")
    return folder


@pytest.fixture
def compared(store):
    opened = RunStore(f"sqlite:///{store}/mlruns.db")
    return opened, compare_runs(opened.find(["lr"]), last=10)


def test_runs_that_differ_in_the_seed_alone_are_one_group(compared):
    _, comparison = compared
    assert comparison.differing == ("optimizer.lr",)
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [("lr 0.01", 2), ("lr 0.001", 1)]


def test_final_figures_are_means_of_the_last_steps_with_students_interval(compared):
    _, comparison = compared
    fast, slow = comparison.groups
    ends = [np.mean([loss(0.01, seed, step) for step in range(31, 41)]) for seed in (0, 1)]
    assert fast.final["loss"].values == pytest.approx(ends)
    assert fast.final["loss"].mean == pytest.approx(np.mean(ends))
    reach = 12.706 * abs(ends[1] - ends[0]) / 2  # of two values: t at one degree of freedom, half of their distance
    assert fast.final["loss"].interval == pytest.approx((np.mean(ends) - reach, np.mean(ends) + reach), rel=1e-4)
    assert slow.final["loss"].interval is None
    assert slow.final["val/loss"].mean == pytest.approx(2 * loss(0.001, 0, 40))  # measured less often: the last value
    assert comparison.best("val/loss") is fast
    assert comparison.frame_metrics == {"loss": [f"loss_frame_{frame}" for frame in range(12)]}


def test_cost_counts_every_step_once_whatever_stands_for_it(compared):
    opened, comparison = compared
    cost = run_cost(comparison.groups[1].runs[0])
    assert (cost.device_hours, cost.tokens) == (pytest.approx(2 * 40 * 0.5 / 3600), pytest.approx(40 * 500))
    blocks = 2 * 64 * (2 * 4 * 32 + 3 * 128)
    assert cost.flops == pytest.approx(6 * (blocks + (100_000 - blocks) / 2) * 20_000)
    assert comparison.groups[0].cost.device_hours == pytest.approx(2 * cost.device_hours)
    thinner = opened.find(["slow-0"])[0]
    every_fourth = {step: value for step, value in thinner.curves["step_seconds"].items() if step % 4 == 0}
    thinner.curves["step_seconds"] = every_fourth
    assert run_cost(thinner).device_hours == pytest.approx(cost.device_hours)


@pytest.mark.parametrize("how", ["experiment", "run names", "run ids", "outputs", "twice"])
def test_whatever_names_runs_finds_them_once(store, compared, how):
    runs = compared[0].find(["lr"])
    names = {
        "experiment": ["lr"],
        "run names": [run.name for run in runs],
        "run ids": [run.run_id for run in runs],
        "outputs": [str(store / "runs" / run.name) for run in runs],
        "twice": ["lr", runs[0].run_id, str(store / "runs" / runs[1].name)],
    }[how]
    opened = RunStore(None if how == "outputs" else f"sqlite:///{store}/mlruns.db")
    assert [run.name for run in opened.find(names)] == ["fast-0", "fast-1", "slow-0"]


def test_the_store_of_the_working_folder_is_found(store, monkeypatch):
    monkeypatch.chdir(store)
    assert len(RunStore(None).find(["lr"])) == 3


def test_what_names_nothing_is_told_with_what_there_is(store, tmp_path, monkeypatch):
    opened = RunStore(f"sqlite:///{store}/mlruns.db")
    with pytest.raises(UserError, match=r"'nothing' is no experiment, .* has the experiments .*lr"):
        opened.find(["nothing"])
    with pytest.raises(UserError, match="there is no such file"):
        RunStore(f"sqlite:///{tmp_path}/none.db").find(["lr"])
    assert not (tmp_path / "none.db").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"found none: name it by --tracking-uri"):
        RunStore(None).find(["lr"])


def test_the_page_and_the_files_say_the_same(compared, tmp_path, monkeypatch):
    opened, comparison = compared
    write_report(tmp_path / "out", comparison, opened)
    values = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert values == json.loads(json.dumps(as_json(comparison)))
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert [(row["name"], row["optimizer.lr"], row["seed"]) for row in rows] == [
        ("fast-0", "0.01", "0"),
        ("fast-1", "0.01", "1"),
        ("slow-0", "0.001", "0"),
    ]
    assert float(rows[0]["loss"]) == pytest.approx(values["groups"][0]["final"]["loss"]["values"][0])
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<svg") == 3  # training loss, validation loss, loss by frame
    assert "Lowest validation loss: <b>lr 0.01</b>" in page
    assert "<h3>a red ball</h3>" in page
    assert page.count("data:video/mp4") == 2  # the newest of each group
    assert page.count("step 40</figcaption>") == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page needs something from elsewhere"
    text = as_text(comparison)
    assert "lr 0.001" in text
    assert "optimizer.lr" in text
    monkeypatch.setattr(report, "_MAX_BYTES", 7)
    write_report(tmp_path / "out", comparison, opened)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("data:video/mp4") == page.count("no room on this page for the sample of lr 0.001, step 40") == 1


@pytest.fixture
def odd_store(store, request):
    """An experiment to which a test adds runs: name, parameters and losses of each."""
    client, name = MlflowClient(f"sqlite:///{store}/mlruns.db"), request.node.name
    home = client.create_experiment(name, (store / "artifacts").as_uri())

    def add(name, losses, *, ended=True, **params):
        run = client.create_run(home, run_name=name)
        metrics = [Metric("loss", value, 1000 * step, step) for step, value in enumerate(losses, start=1)]
        logged = [Param(key, str(value)) for key, value in ({"optimizer.lr": 0.1, "seed": 0} | params).items()]
        client.log_batch(run.info.run_id, metrics=metrics, params=logged)
        if ended:
            client.set_terminated(run.info.run_id)

    add.found = lambda *names: RunStore(f"sqlite:///{store}/mlruns.db").find(names or [name])
    return add


def test_versions_devices_and_older_programs_make_no_other_group(odd_store):
    odd_store("old", [2.0, 1.0])
    odd_store(
        "new",
        [2.0, 1.0],
        seed=1,
        device="cpu",
        **{"versions.torch": "3", "data.order": 1, "ema": None, "samples.every": 0},
    )
    runs = odd_store.found()
    neutral = {"data.order": "1", "ema": "None"}
    assert [len(group.runs) for group in compare_runs(runs, neutral=neutral).groups] == [2]
    odd_store("other", [2.0, 1.0], **{"data.order": 2})
    comparison = compare_runs(odd_store.found(), neutral=neutral)
    assert [dict(group.differences) for group in comparison.groups] == [{"data.order": "1"}, {"data.order": "2"}]


def test_the_page_says_whose_seeds_are_too_few(odd_store, store, tmp_path):
    def page():
        write_report(tmp_path / "out", compare_runs(odd_store.found()), RunStore(f"sqlite:///{store}/mlruns.db"))
        return (tmp_path / "out" / "compare.html").read_text()

    odd_store("best", [2.0, 1.0])
    odd_store("other", [2.0, 1.5], **{"optimizer.lr": 0.2})
    assert "One seed each: how much seeds differ" in page()
    odd_store("again", [2.0, 1.6], seed=1, **{"optimizer.lr": 0.2})
    assert "It has one seed only: how much seeds differ" in page()


def test_groups_of_one_name_stay_apart(odd_store):
    for letter in "ab":
        odd_store("one name", [2.0, 1.0], **{"data.dataset": letter * 70})
    comparison = compare_runs(odd_store.found())
    assert [group.label for group in comparison.groups] == ["one name", "one name (2)"]


def test_groups_whose_names_look_numbered_stay_apart(odd_store):
    for number, name in enumerate(("one", "one (2)", "one")):
        odd_store(name, [2.0, 1.0], **{"data.dataset": str(number) * 70})
    labels = [group.label for group in compare_runs(odd_store.found()).groups]
    assert len(set(labels)) == 3, labels


def test_keys_of_one_last_part_are_named_whole(odd_store):
    odd_store("a", [2.0, 1.0], **{"ema.decay": 0.9, "schedule.decay": "linear"})
    odd_store("b", [2.0, 1.0], **{"ema.decay": 0.8, "schedule.decay": "cosine"})
    labels = {group.label for group in compare_runs(odd_store.found()).groups}
    assert "ema.decay 0.9, schedule.decay linear" in labels


@pytest.mark.parametrize(
    ("half", "told"), [(0.123, "1 ± 0.12"), (99.4, "1 ± 99"), (99.7, "1 ± 99.7"), (123.4, "1 ± 123.4")]
)
def test_an_interval_is_told_without_powers_of_ten(half, told):
    assert figure_text(Figure(1.0, (1 - half, 1 + half), (1.0,))) == told


def test_device_hours_are_of_the_workers_that_took_part(compared):
    run = compared[1].groups[1].runs[0]
    rates = run.curves["tokens_per_s"]
    halved = {step: rate / (1 if step <= STEPS / 2 else 2) for step, rate in rates.items()}  # one of 2 at first
    elastic = replace(run, curves={**run.curves, "tokens_per_s_per_device": halved})
    assert run_cost(elastic).device_hours == pytest.approx(0.75 * run_cost(run).device_hours)


def test_a_loss_that_is_no_number_never_wins(odd_store):
    odd_store("broken", [2.0, float("nan"), float("nan")])
    odd_store("sound", [2.0, 1.0, 1.0], **{"optimizer.lr": 0.2})
    comparison = compare_runs(odd_store.found(), last=2)
    assert comparison.best("loss").runs[0].name == "sound"
    json.dumps(as_json(comparison), allow_nan=False)


def test_quotes_in_names_runs_that_go_on_and_those_without_steps(odd_store, caplog):
    odd_store("it's \"it", [1.0])
    odd_store("it's one", [1.0], ended=False)
    odd_store("not begun", [])
    for name in ("it's one", "it's \"it"):
        assert [run.name for run in odd_store.found(name)] == [name]
    comparison = compare_runs(odd_store.found())
    assert "no step is recorded of them: not begun" in caplog.text
    assert "Not ended yet, so as far as they are: it's one." in as_text(comparison)


def test_a_run_file_that_cannot_be_read_is_told(tmp_path):
    for run, config in (("{", "{}"), ('{"run_id": "x"}', ""), ('{"run_id": "x"}', "tracking: [")):  # cut off by a kill
        (tmp_path / "run.json").write_text(run)
        (tmp_path / "config.yaml").write_text(config)
        with pytest.raises(UserError, match=r"run.json or config.yaml cannot be read [^$]*: name the run by its id"):
            RunStore(None).find([str(tmp_path)])


def test_an_experiment_without_runs_is_told_as_such(store):
    with pytest.raises(UserError, match=r"the experiment 'empty' of .* has no runs: wait until one has begun"):
        RunStore(f"sqlite:///{store}/mlruns.db").find(["empty"])
