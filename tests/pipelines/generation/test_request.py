import pytest

from pipelines.generation.request import file_name


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red square moves left", "a-red-square-moves-left-7.mp4"),
        ("../../etc/passwd", "etc-passwd-7.mp4"),
        ("Ein Würfel fällt!", "ein-wurfel-fallt-7.mp4"),
        ("正方形が動く", "video-7.mp4"),
        ("con\x00trol\nand | pipes", "con-trol-and-pipes-7.mp4"),
        ("", "video-7.mp4"),
    ],
)
def test_names_are_safe_for_any_prompt(prompt: str, name: str) -> None:
    assert file_name(prompt, 7, "mp4") == name


def test_names_of_long_prompts_stay_short_and_differ_by_seed() -> None:
    names = {file_name("word " * 500, seed, "mp4") for seed in (0, 2**63 - 1)}
    assert len(names) == 2
    assert max(map(len, names)) < 120
