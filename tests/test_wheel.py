import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WEIGHTS = ("fsq.safetensors", "fsq_footage.safetensors", "text.json", "README.md")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_file_of_the_packages_and_no_other(wheel):
    expected = {
        str(path.relative_to(ROOT))
        for folder in ("lumos", "pipelines", "jobs", "infra")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"lumos/py.typed", "pipelines/py.typed", "jobs/py.typed"} <= held
    assert [name for name in held if name.startswith("infra/configs/train/")]
    assert [name for name in held if name.startswith("infra/deepspeed/")]
    assert {f"lumos/tokenizers/weights/{name}" for name in WEIGHTS} <= held
    assert {"pipelines/pages/base.html.j2", "pipelines/pages/style.css", "pipelines/pages/gallery.js"} <= held


def test_installed_wheel_finds_its_configs_templates_and_embedded_tokenizers(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys, lumos, pipelines.config\n"
        "assert lumos.__file__.startswith(sys.argv[1]), lumos.__file__\n"
        "from lumos.tokenizers import TextTokenizer, TokenizerConfig, load_video_tokenizer\n"
        "assert TextTokenizer.load(None).encode('a red square')\n"
        "assert load_video_tokenizer(TokenizerConfig(kind='fsq')).codebook_size <= 4096\n"
        "assert load_video_tokenizer(TokenizerConfig(kind='fsq-footage')).codebook_size == 64000\n"
        "assert pipelines.config.shipped_configs('train')\n"
        "from pipelines.pages import render\n"
        "names = render._environment().list_templates(extensions=['j2'])\n"
        "assert len([render._environment().get_template(name) for name in names]) >= 3\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
