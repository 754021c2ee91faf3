"""The verbs as jobs on a cluster that was there before, with and without a token."""

import pytest

from tests.jobs.ray_head import ray_head


@pytest.fixture(params=["disabled", "token"])
def submit(request):
    """A function that submits `python ARGS` to a cluster of its own and waits for the job to end."""
    with ray_head(request.param) as head:

        def run(*args: str) -> None:
            command = ["ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", "python", *args]
            done = head.run(*command)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

        yield run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_curate_train_generate_as_ray_jobs(submit, tmp_path):
    from pipelines.sample_corpus import write_corpus

    write_corpus(tmp_path / "corpus", 0, 24)
    submit("jobs/curate.py", "demo", f"source.path={tmp_path / 'corpus'}", f"dataset={tmp_path / 'dataset'}")
    train = ["data.dataset=" + str(tmp_path / "dataset"), f"output={tmp_path / 'train'}"]
    submit(
        "jobs/train.py",
        "demo",
        *train,
        "steps=4",
        "optimizer.warmup_steps=1",
        "global_batch=4",
        "micro_batch_tokens=512",
    )
    model = tmp_path / "train" / "export"
    generate = ["--model", str(model), "--prompt", "a red square moves left", "--out", str(tmp_path / "videos")]
    submit("jobs/generate.py", *generate, "sampling.num_steps=2")
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
