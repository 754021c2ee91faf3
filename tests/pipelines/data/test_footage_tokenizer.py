"""A dataset by the embedded tokenizer for footage: it is found again without a path, and told of with its figures."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

from jobs.data import command
from lumos.tokenizers import FsqTokenizer
from pipelines.data.curate import curate
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.upkeep.codes import snapshot_tokenizer
from pipelines.data.upkeep.verify import recheck
from pipelines.errors import UserError
from tests.pipelines.data.corpora import GOOD, copy_stages, curate_config

OPTIONS = ("tokens.tokenizer.kind=fsq-footage", "tokens.decode_back_share=1.0")


@pytest.fixture(scope="module")
def footage(curated, corpus, tmp_path_factory):
    """The dataset, and what its run told."""
    dataset = copy_stages(curated[0], tmp_path_factory.mktemp("footage") / "d")
    return dataset, curate(curate_config(corpus, dataset, "null", *OPTIONS))


def scores(dataset, name):
    rows = open_snapshot(str(dataset)).read_ledger().to_pylist()
    return {row["key"]: row["scores"][name] for row in rows if row["status"] == "kept"}


def test_a_snapshot_finds_the_tokenizer_that_made_it_by_its_kind(footage, curated):
    snapshot = open_snapshot(str(footage[0]))
    ours = FsqTokenizer(kind="fsq-footage")
    info = snapshot.manifest.tokenizer
    assert (info.kind, info.codebook_size, info.weights_hash) == ("fsq-footage", 64_000, ours.weights_hash)
    assert open_snapshot(str(footage[0]), expected_tokenizer=ours) == snapshot
    with pytest.raises(UserError, match=r"made by the tokenizer fsq-footage .* not by fsq \("):
        open_snapshot(str(footage[0]), expected_tokenizer=FsqTokenizer())
    found = snapshot_tokenizer(snapshot, None)
    assert (found.kind, found.weights_hash) == ("fsq-footage", ours.weights_hash)
    checked = recheck(snapshot, 100)
    assert (len(checked.psnr), checked.equal, checked.problems) == (GOOD + 1, 1.0, ())
    assert snapshot_tokenizer(open_snapshot(str(curated[0])), None) is None  # of a file of its own


def test_the_run_the_card_and_the_report_tell_of_the_same_figures(footage, tmp_path):
    dataset, result = footage
    psnrs, ssims = (np.array(list(scores(dataset, name).values())) for name in ("psnr", "ssim"))
    assert len(psnrs) == len(ssims) == GOOD + 1
    told = (
        f"PSNR {psnrs.mean():.1f} dB on average, {psnrs.min():.1f} dB at worst; SSIM {ssims.mean():.3f} on average, "
        f"{ssims.min():.3f} at worst (measured on {GOOD + 1} of {GOOD + 1} clips)"
    )
    short = result.tokenizer.weights_hash[:19]
    assert f"\ncodes by fsq-footage (64000 codes, weights {short})\nwhat they show: {told}" in result.summary()
    snapshot = open_snapshot(str(dataset))
    with open(f"{snapshot.uri}/README.md") as card:
        assert told in card.read()
    out = tmp_path / "report.html"
    shown = CliRunner().invoke(command, ["report", str(dataset), "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    page = out.read_text(encoding="utf-8")
    words = " ".join(page.split())
    assert f"<b>fsq-footage</b>: 64000 codes, weights <code>{short}</code>" in words
    assert told in words
    worst = page.partition('<h3 id="worst">')[2].partition("<h3")[0]
    assert f"<i>6 of {GOOD + 1} measured</i>" in worst
    found = re.findall(r"<b>([\d.]+) dB</b>\s*<span>SSIM ([\d.]+)</span>", worst)
    lowest = sorted(scores(dataset, "psnr").items(), key=lambda item: item[1])[:6]
    assert found == [(f"{psnr:.1f}", f"{scores(dataset, 'ssim')[key]:.3f}") for key, psnr in lowest]
    assert worst.count('alt="codes of frame') == worst.count('alt="frame') == 6 * 3
