import base64
import re
from importlib import resources
from pathlib import Path

import jinja2
import pytest

from pipelines.errors import UserError
from pipelines.pages import render
from pipelines.pages.render import check_writable, data_uri, shorten, write_page


def test_a_page_that_lacks_a_value_is_not_written(tmp_path: Path):
    with pytest.raises(jinja2.UndefinedError, match="manifest"):
        write_page(tmp_path / "page.html", "data_report.html.j2", statuses=[])
    assert not (tmp_path / "page.html").exists()


def test_text_is_escaped_in_every_template():
    environment = render._environment()
    assert environment.list_templates()
    assert environment.from_string("{{ text }}").render(text="<b title='&'>") == "&lt;b title=&#39;&amp;&#39;&gt;"


def test_every_colour_of_the_look_has_a_dark_one_and_every_used_one_is_there():
    style = (resources.files("pipelines.pages") / "style.css").read_text(encoding="utf-8")
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL))
    assert light == dark
    used = set()
    for path in resources.files("pipelines.pages").iterdir():
        if path.name.endswith((".j2", ".css")):
            used |= set(re.findall(r"var\((--[\w-]+)\)", path.read_text(encoding="utf-8")))
    assert used <= light


def test_a_page_that_cannot_be_written_is_found_out_before_any_work(tmp_path: Path):
    check_writable(tmp_path / "new" / "page.html")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(UserError, match=f"--out {path} cannot be written .*; name another file"):
            check_writable(path)


def test_a_data_uri_holds_the_content(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"\0video\xff")
    for content in (b"\0video\xff", tmp_path / "a.mp4"):
        head, data = data_uri(content, "video/mp4").split(",")
        assert head == "data:video/mp4;base64"
        assert base64.b64decode(data) == b"\0video\xff"


def test_a_long_path_loses_its_middle():
    assert shorten("short", 10) == "short"
    assert shorten("0123456789abcdef", 9) == "0123…cdef"
    assert len(shorten("x" * 99, 64)) == 64
