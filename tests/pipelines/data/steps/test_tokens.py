import numpy as np
import pytest
import torch

from lumos.tokenizers import TokenizerConfig, load_video_tokenizer
from pipelines.data.config import TokenConfig
from pipelines.data.settings import DecodeConfig
from pipelines.data.steps.tokens import TokenFunction, load_tokenizer_info
from pipelines.data.video.reader import ClipRequest, read_clip
from pipelines.media import psnr, ssim
from tests.pipelines.data.videos import moving_square, write_video

SPAN = {"start_s": 0.0, "rotation": 0, "picture": None, "pixel_aspect": 1.0, "origin_s": 0.0, "clean_clock": True}


@pytest.fixture
def rows(tmp_path):
    """Nine clips of two lengths."""
    made = []
    for index in range(9):
        count = 17 if index % 3 else 9
        path = write_video(tmp_path / f"{index}.mp4", moving_square(20, seed=index))
        shape = {"num_frames": count, "width": 48, "height": 32}
        span = SPAN | {"end_s": 20 / 12, "source_frames": 20}
        shape |= {"decode_back": index == 3, "split_part": None}
        made.append({"work_key": f"w{index}", "key": f"k{index}", "uri": str(path), **shape, **span})
    return made


def encode(rows, tmp_path, tokenizer_file, batch_size=1):
    config = TokenConfig(tokenizer=TokenizerConfig(path=str(tokenizer_file)), batch_size=batch_size)
    function = TokenFunction(str(tmp_path), config=config, decode=DecodeConfig(), threads=1)
    try:
        return {row["key"]: row for row in function(rows)}
    finally:
        function.reader.child.close()


def test_codes_are_the_tokenizers_of_the_clips_own_frames(rows, tmp_path, tokenizer_file):
    found = encode(rows, tmp_path, tokenizer_file)
    assert found.keys() == {f"k{index}" for index in range(9)}
    tokenizer = load_video_tokenizer(TokenizerConfig(path=str(tokenizer_file)))
    for row in rows:
        wanted = {name: row[name] for name in ("num_frames", "width", "height", "end_s", "source_frames")}
        frames = read_clip(ClipRequest(path=row["uri"], fps=12.0, **SPAN | wanted), beat=lambda: None)
        codes = tokenizer.encode(torch.from_numpy(frames)[None])[0].numpy()
        made = found[row["key"]]
        assert (made["t"], made["h"], made["w"]) == codes.shape
        assert np.array_equal(np.array(made["codes"]).reshape(codes.shape), codes)
        if row["decode_back"]:
            shown = tokenizer.decode(torch.from_numpy(codes)[None])[0].numpy()
            assert made["psnr"] == pytest.approx(psnr(frames, shown), abs=1e-3)
            each = [ssim(frame, other) for frame, other in zip(frames, shown, strict=True)]
            assert made["ssim"] == pytest.approx(sum(each) / len(each), abs=1e-4)
        else:
            assert not made.keys() & {"psnr", "ssim"}


def test_codes_do_not_depend_on_batch_mates_order_or_filling(rows, tmp_path, tokenizer_file):
    one = encode(rows, tmp_path, tokenizer_file, batch_size=4)
    other = encode([rows[i] for i in (8, 0, 5, 3, 1)], tmp_path, tokenizer_file, batch_size=4)
    alone = encode(rows[:1], tmp_path, tokenizer_file, batch_size=4)
    for key, row in {**other, **alone}.items():
        assert row["codes_sha256"] == one[key]["codes_sha256"]


def test_a_clip_that_cannot_be_decoded_again_fails_alone(rows, tmp_path, tokenizer_file):
    with open(rows[4]["uri"], "wb") as file:
        file.write(b"something else")
    rows[5]["uri"] += ".gone"
    found = encode(rows, tmp_path, tokenizer_file)
    assert found["k4"]["error"].startswith("not_a_video (permanent)")
    assert found["k5"]["error"].startswith("missing_file (transient)")
    assert [key for key, row in found.items() if row.get("error") is None] == [f"k{i}" for i in (0, 1, 2, 3, 6, 7, 8)]


def test_what_identifies_a_tokenizer(tokenizer_file):
    info = load_tokenizer_info(TokenizerConfig(path=str(tokenizer_file)))
    assert (info.kind, info.codebook_size, info.compression) == ("fsq", 1000, (4, 8, 8))
    assert info.weights_hash.startswith("sha256:")
