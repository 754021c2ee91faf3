from dataclasses import replace

from pipelines.training.progress import Progress
from tests.pipelines.training.runs import step_record


def test_cut_captions_are_told_once(capsys):
    with Progress(5, done=0, enabled=True) as progress:
        for step in range(1, 6):
            cut = {"cut_captions": 2, "longest_caption": 300 + step} if step > 2 else {}
            progress.show(replace(step_record(step), clips=8, **cut))
    told = [line for line in capsys.readouterr().err.splitlines() if "captions" in line]
    assert len(told) == 1
    assert "step 3: 2 of 8 captions did not fit" in told[0]
    assert "the longest prompt has 303 tokens" in told[0]
