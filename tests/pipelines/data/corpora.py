"""Small corpora of real files with a known fate, configs to curate them, and what identical means."""

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.config import load_config
from pipelines.data.config import CurateConfig
from pipelines.data.reasons import reason_classes
from pipelines.data.snapshot.read import Snapshot
from tests.pipelines.data.videos import moving_square, still, write_table, write_video

GOOD = 6


def write_corpus(folder: Path, good: int = GOOD) -> Path:
    """``good`` clips of 18 frames, and one file of each kind that must not be kept."""
    folder.mkdir(parents=True)
    for index in range(good):
        write_video(folder / f"good_{index:03d}.mp4", moving_square(18, seed=index))
    write_video(folder / "small_subject.mp4", moving_square(18, size=(160, 160), side=8))
    write_video(folder / "static.mp4", still(18))
    write_video(folder / "black.mp4", still(18, level=0))
    write_video(folder / "short.mp4", moving_square(5))
    whole = write_video(folder / "truncated.mp4", moving_square(60, seed=99), options={"crf": "4", "g": "6"})
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "text.mp4").write_text("not a video " * 99)
    (folder / "empty.mp4").touch()
    (folder / "link.mp4").symlink_to("nowhere")
    shutil.copy(folder / "good_000.mp4", folder / "twin of 'good' 0.mp4")
    names = sorted(path.name for path in folder.iterdir())
    write_table(folder / "captions.csv", [(name, f"this is {name}") for name in names])
    return folder


FATES = {
    "static.mp4": ("rejected", "motion_time"),
    "black.mp4": ("rejected", "brightness"),
    "short.mp4": ("rejected", "duration"),
    "truncated.mp4": ("rejected", "decoded_share"),
    "text.mp4": ("failed", "not_a_video"),
    "empty.mp4": ("failed", "empty_file"),
    "link.mp4": ("failed", "missing_file"),
    "twin of 'good' 0.mp4": ("duplicate", "exact"),
    "small_subject.mp4": ("kept", ""),
}


def curate_config(corpus: Path | str, dataset: Path | str, tokenizer: Path, *overrides: str) -> CurateConfig:
    """The demo's config on another corpus, for clips of 17 frames."""
    paths = [f"source.path={corpus}", f"dataset={dataset}", f"tokens.tokenizer.path={tokenizer}"]
    length = ["tokens.num_frames=[17]", "thresholds.min_duration=1.41"]
    means = ["progress=false", "resources.workers=1"]
    return load_config(CurateConfig, "demo", [*paths, *length, *means, *overrides])


def copy_stages(dataset: Path, target: Path) -> Path:
    """What the stages of a dataset computed, for another that is to compute only what differs."""
    shutil.copytree(dataset / "stages", target / "stages")
    return target


def reason_class(reason: str) -> str:
    """What one reason is about."""
    return reason_classes(pa.chunked_array([[reason]], pa.string()))[0].as_py()


def published(snapshot: Snapshot) -> dict[str, str]:
    """SHA-256 of every file of a snapshot, and its ledger's rows: two runs are identical when this is equal."""
    root, files = Path(snapshot.uri), {}
    if storage.is_local(snapshot.uri):
        for path in sorted(root.rglob("*")):
            if path.is_file():
                files[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        files = {found.path: storage.sha256_file(found.uri) for found in storage.list_files(snapshot.uri)}
    ledger = snapshot.read_ledger()
    assert ledger.equals(ledger.take(pc.sort_indices(ledger, sort_keys=[("key", "ascending")])))
    return files | {"id": snapshot.manifest.snapshot_id, "rows": str(ledger.num_rows)}
