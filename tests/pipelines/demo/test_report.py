"""The report is one page that holds everything: real videos, figures that agree with the summary, escaped text."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import sample_corpus as corpus
from pipelines.demo import run
from pipelines.demo.run import Sample, write_real_clips, write_report
from pipelines.evaluation import judge
from tests.pipelines.training.runs import step_record


def make_samples(root: Path, count: int) -> list[Sample]:
    """Held-out clips at 48x48, two per prompt; the second of every third prompt shows the next prompt's video."""
    specs = corpus.held_out_specs(0)[:count]
    real = write_real_clips(root / "real", specs)
    samples = []
    for index, spec in enumerate(specs):
        asked = judge.asked_for_by(spec)
        for seed in range(2):
            shown = specs[(index + 1) % count] if seed == 1 and index % 3 == 0 else spec
            frames = corpus.render_clip(shown)[:, ::2, ::2]
            path = root / f"{index:03d}_{seed}.mp4"
            corpus.write_video(path, frames)
            read = judge.judge_video(frames)
            samples.append(Sample(prompt=spec.caption, seed=seed, video=path, real=real[index], asked=asked, read=read))
    return samples


def make_report(root: Path, count: int) -> dict[str, Any]:
    samples = make_samples(root, count)
    result = judge.score([sample.read for sample in samples], [sample.asked for sample in samples])
    generator = np.random.default_rng(0)
    records = []
    for step in range(1, 401):
        frames = tuple(
            float(2 + 0.2 * f + 6 * np.exp(-step / (60 + 15 * f)) + generator.normal(0, 0.1)) for f in range(5)
        )
        records.append(replace(step_record(step, float(np.mean(frames))), frame_losses=frames))
    seconds = {"corpus": 4.2, "curate": 64.0, "train": 301.5, "generate": 81.0, "judge": 2.4, "report": 0.6}
    summary = {
        "schema": 1,
        "seed": 0,
        "seconds": seconds | {"total": sum(seconds.values())},
        "peak_memory_gb": 5.31,
        "clips": {"sources": 809, "kept": 800, "rejected": 5, "failed": 3, "duplicate": 1},
        "train": {"steps": 400, "loss_first": 8.31, "loss_last": 2.4, "tokens_per_s": 11234.0},
        "sampling": {"num_steps": 12, "guidance_scale": 2.5, "history_ratio": 0.4, "temperature": 1.0},
        **vars(result),
    }
    not_kept = [{"path": name, "status": "rejected", "reason": why} for name, why in corpus.BAD_FILES.items()]
    return {
        "summary": summary,
        "samples": samples,
        "records": records,
        "not_kept": [*not_kept, {"path": "a<b>.mp4", "status": "failed", "reason": "x & y"}],
        "next_steps": [("One video of your own:", 'lumos generate --model demo/model --prompt "A large red bar"')],
    }


class Outline(HTMLParser):
    """Counts tags, and checks that they close in order."""

    void = frozenset({"meta", "input", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_holds_every_video_and_is_well_formed(tmp_path: Path):
    report = make_report(tmp_path, 6)
    write_report(tmp_path / "report.html", **report)
    page = (tmp_path / "report.html").read_text()
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.count["video"] == 18
    assert outline.count["article"] == outline.count["button"] == 6
    assert page.count('type="range" min="0" max="12"') == 6
    videos = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    first, second = report["samples"][:2]
    files = [first.real, first.video, second.video]
    assert [base64.b64decode(video) for video in videos[:3]] == [file.read_bytes() for file in files]


def test_report_needs_no_other_file_and_no_network(tmp_path: Path):
    write_report(tmp_path / "report.html", **make_report(tmp_path, 2))
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "http" not in page
    assert "@import" not in page


def test_report_marks_what_is_wrong_and_escapes_text(tmp_path: Path):
    report = make_report(tmp_path, 6)
    write_report(tmp_path / "report.html", **report)
    page = (tmp_path / "report.html").read_text()
    wrong = [sample for sample in report["samples"] if sample.read != sample.asked]
    assert len(wrong) == 2
    assert page.count("has-error") == 2 + 1  # two prompts, and the style rule
    first = wrong[0]
    assert f'<li class="wrong">{first.read.direction}, not {first.asked.direction}</li>' in page
    assert "a&lt;b&gt;.mp4" in page
    assert "x &amp; y" in page


def test_report_tells_the_whole_truth(tmp_path: Path):
    report = make_report(tmp_path, 6)
    write_report(tmp_path / "report.html", **report)
    page = (tmp_path / "report.html").read_text()
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    summary = report["summary"]
    assert f"In {summary['accuracy']['strict']:.0%} of them all five attributes are right at once" in text
    for name, target in run.TARGETS.items():
        reached = "reached" if summary["accuracy"][name] >= target else "missed"
        assert f"{run._NAMES[name]} {summary['accuracy'][name]:.1%}" in text
        assert f"target {target:.0%} {reached}" in text
    assert page.count('class="score"') == len(summary["accuracy"])
    assert text.count("no target") == len(summary["accuracy"]) - len(run.TARGETS)
    assert "12 steps per latent frame, guidance 2.5, 40% of each finished frame hidden" in text
    wrong = sum(not right for sample in report["samples"] for right in sample.right_frames)
    assert wrong > 0
    assert page.count("<i class=wrong>") == wrong


def test_report_works_without_losses_or_rejections(tmp_path: Path):
    full = make_report(tmp_path, 2)
    write_report(tmp_path / "r.html", **(full | {"records": [], "not_kept": [], "next_steps": []}))
    assert "No figures were recorded." in (tmp_path / "r.html").read_text()
