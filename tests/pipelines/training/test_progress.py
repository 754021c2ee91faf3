import re
from dataclasses import replace

from pipelines.training.progress import Progress
from tests.pipelines.training.runs import step_record


def test_lines_with_the_time_stand_where_there_is_no_terminal(capsys):
    with Progress(100, done=0, enabled=True) as progress:
        progress.say("something happened")
        for step in range(1, 101):
            progress.show(replace(step_record(step), val_loss=2.5 if step == 50 else None))
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert lines[0][20:] == "something happened"
    steps = [re.search(r"step (\d+)/100: loss 1.000, 5 tokens/s", line) for line in lines[1:]]
    assert [int(step.group(1)) for step in steps if step] == [1, 50, 100], "the first, a validation, the last"
    assert "validation 2.500" in lines[2]
    assert [" left" in line for line in lines[1:]] == [False, True, True], "after one step nothing is known"


def test_nothing_is_said_where_progress_is_off(capsys):
    with Progress(2, done=0, enabled=False) as progress:
        progress.say("quiet")
        progress.show(step_record(1))
        progress.show(step_record(2))
    assert capsys.readouterr().err == ""
