"""Rules about imports that the import linter cannot hold, because they are about what happens at run time."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.lumos.models import save_tiny_folder

ROOT = Path(__file__).resolve().parent.parent

# Runs in a fresh interpreter: everything that is not the standard library, lumos, or one of the allowed packages and
# what those declare to need, is made absent. Equals an environment with only those packages installed.
ISOLATE = """
import importlib, pkgutil, sys
from importlib import metadata
from packaging.requirements import Requirement

def normal(name):
    return name.lower().replace("_", "-").replace(".", "-")

allowed, queue = set(), ["torch", "numpy", "einops", "jaxtyping", "safetensors", "tokenizers"]
while queue:
    name = normal(queue.pop())
    if name in allowed:
        continue
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue  # for another platform
    allowed.add(name)
    needed = map(Requirement, requires)
    queue += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
owners = metadata.packages_distributions()
modules = {module for module, names in owners.items() if any(normal(name) in allowed for name in names)}

class Only:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in modules or top in sys.stdlib_module_names or top.startswith(("lumos", "_sysconfigdata")):
            return self.finder.find_spec(name, path, target)

    def find_distributions(self, context=metadata.DistributionFinder.Context()):
        find = getattr(self.finder, "find_distributions", lambda context: ())
        return (d for d in find(context) if normal(d.name) in allowed)

for name in [m for m in sys.modules if m.partition(".")[0] == "packaging"]:
    del sys.modules[name]
sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
for absent in ("ray", "deepspeed", "mlflow", "pyarrow", "av", "pydantic", "pipelines", "jobs"):
    try:
        importlib.import_module(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{absent} could be imported: the test does not isolate")

import lumos
names = ["lumos"] + [m.name for m in pkgutil.walk_packages(lumos.__path__, "lumos.")]
for name in names:
    importlib.import_module(name)
print(*names)
"""

# A model is built, trained a little, saved, loaded and asked for a video; both embedded tokenizers are used.
USE = """
import tempfile
import torch
from lumos.batch import PackedBatch
from lumos.checkpoint import save_checkpoint
from lumos.config import MaskConfig, ModelConfig
from lumos.decoder import Decoder
from lumos.layout import build_sequence
from lumos.losses import masked_visual_loss
from lumos.masking import apply_mask, sample_masked_positions
from lumos.tokenizers import TextTokenizer, TokenizerConfig, load_video_tokenizer
from lumos.tokenizers.text import EMBEDDED_FILE
from lumos.vocabulary import Vocabulary

text, video = TextTokenizer.load(None), load_video_tokenizer(TokenizerConfig(kind="fsq"))
vocabulary = Vocabulary.compact(text.vocab_size, video.codebook_size)
codes = video.encode(torch.randint(0, 256, (1, 5, 32, 32, 3), dtype=torch.uint8))
ids, layout = build_sequence(vocabulary, text.encode("a red square"), codes[0].numpy(), fps=12)
generator = torch.Generator().manual_seed(0)
model = Decoder(ModelConfig(
    vocab_size=vocabulary.vocab_size, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=32,
))
model.init_weights(generator)
masked = sample_masked_positions(layout, MaskConfig(), generator)
hidden = model(apply_mask(ids, masked, vocabulary), [layout])
masked_visual_loss(hidden, model.lm_head, PackedBatch(ids, masked, (layout,)), vocabulary).total.backward()
assert model.lm_head.visual.grad.abs().sum() > 0
with tempfile.TemporaryDirectory() as folder:
    save_checkpoint(folder + "/model", model, vocabulary, text_tokenizer=EMBEDDED_FILE.read_text(encoding="utf-8"))
    loaded = lumos.load(folder + "/model", tokenizer_kind="fsq")
frames = loaded.generate("a blue circle", seed=7, size="32x32", num_frames=5, fps=12, num_steps=2)
assert frames.shape == (5, 32, 32, 3)
"""


def run_python(code: str, folder: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # for such small models
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lumos_imports_with_its_own_dependencies_alone():
    imported = run_python(ISOLATE).split()
    assert {"lumos", "lumos.decoder", "lumos.sampling", "lumos.checkpoint"} <= set(imported)
    assert len(imported) >= len([path for path in (ROOT / "lumos").rglob("*.py") if path.stem != "__init__"])


def test_lumos_runs_with_its_own_dependencies_alone():
    run_python(ISOLATE + USE)


def test_the_example_of_the_readme_runs_with_the_dependencies_of_lumos_alone(tmp_path):
    examples = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(examples) == 1
    (folder,) = re.findall(r'lumos\.load\("(.+?)"\)', examples[0])
    save_tiny_folder(tmp_path / folder)
    loaded = "\nimport sys\nprint([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    *printed, compiler = run_python(ISOLATE + examples[0] + loaded, tmp_path).splitlines()
    assert compiler == "[]", "loading and drawing import torch's compiler, for seconds"
    frames = np.load(tmp_path / "video.npy")
    assert (frames.shape, frames.dtype) == ((5, 16, 32, 3), np.uint8)
    assert printed[1] == "(5, 16, 32, 3) uint8"  # the first line is ISOLATE's


def test_importing_lumos_loads_nothing():
    loaded = "[name for name in sys.modules if name.partition('.')[0] in ('torch', 'numpy', 'lumos')]"
    assert run_python(f"import sys, lumos\nprint({loaded})").strip() == "['lumos']"


@pytest.mark.parametrize("top", ["lumos", "pipelines", "jobs"])
def test_package_inits_do_not_import_ray(top):
    packages = [m.name for m in pkgutil.walk_packages([str(ROOT / top)], f"{top}.") if m.ispkg]
    code = f"import sys, {', '.join([top, *packages])}\nprint([m for m in sys.modules if m.partition('.')[0] == 'ray'])"
    assert run_python(code).strip() == "[]"


def test_workers_of_stages_that_compute_nothing_with_torch_do_not_load_it():
    """Each process of such a stage would take a second and hundreds of MB more."""
    stages = (
        "steps.sources",
        "steps.split",
        "steps.looks",
        "steps.duplicates",
        "captions.given",
        "captions.endpoint",
    )
    modules = ", ".join(f"pipelines.data.{module}" for module in (*stages, "video.decode_child"))
    assert run_python(f"import sys, {modules}\nprint('torch' in sys.modules)").strip() == "False"
