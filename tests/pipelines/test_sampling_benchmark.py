"""Ways to draw, compared on a small model that has learnt nothing."""

import pytest

from pipelines.benchmarks.sampling import MEASURES, SamplingBenchmark, lines, run_sampling_benchmark
from pipelines.errors import UserError
from tests.lumos.models import save_tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "export"
    save_tiny_folder(path)
    return str(path)


def test_ways_are_drawn_judged_and_compared_with_the_full_sampler(folder, tmp_path):
    chosen = ("bfloat16", "Halton order", "history ratio 0.3", "history ratio 0.7")
    config = SamplingBenchmark(model=folder, prompts=3, seeds=2, threads=1, only=chosen)
    page = tmp_path / "page.html"
    found = run_sampling_benchmark(config, page)
    assert list(found["ways"]) == ["full", *chosen]
    assert found["videos_of_each"] == 6
    assert found["ways"]["full"]["speed"] == 1.0
    for way in found["ways"].values():
        for measure in MEASURES:
            low, high = way[measure]["interval95"]
            assert 0.0 <= low <= way[measure]["mean"] <= high <= 1.0
    same = [name for name in chosen if found["ways"][name]["sampling"] == found["ways"]["full"]["sampling"]]
    assert same == ["bfloat16", "history ratio 0.7"]
    assert all(found["ways"][same[1]][measure]["difference95"] == (0.0, 0.0) for measure in MEASURES)
    for name in ("bfloat16", "Halton order"):
        assert found["ways"][name]["consistency"]["difference95"] != (0.0, 0.0)
    assert [line.partition(":")[0] for line in lines(found)] == list(found["ways"])
    text = page.read_text()
    assert "Halton order" in text
    assert "history ratio" in text


def test_an_unknown_way_and_a_missing_model_are_told(folder):
    with pytest.raises(UserError, match=r"--only 'faster' is no way to draw; known: full, bfloat16, half the steps"):
        run_sampling_benchmark(SamplingBenchmark(model=folder, only=("faster",)), None)
    with pytest.raises(UserError, match=r"--model: .*nowhere"):
        run_sampling_benchmark(SamplingBenchmark(model="nowhere"), None)
