import functools
import operator

import numpy as np
import pytest
import torch

from lumos.compression import num_latent_frames, num_source_frames
from lumos.layout import build_sequence, parse, video_layout
from lumos.rope import position_ids
from lumos.vocabulary import Vocabulary

from .models import VOCABULARY, tiny_config


@pytest.mark.parametrize("vocabulary", [VOCABULARY, Vocabulary.lumos1()])
@pytest.mark.parametrize("drop_text", [False, True])
def test_a_built_layout_is_what_parsing_finds(vocabulary, drop_text):
    codes = np.random.default_rng(0).integers(0, 32, (3, 8, 12))
    ids, layout = build_sequence(vocabulary, [5, 6, 7], codes, fps=12, drop_text=drop_text)
    assert parse(vocabulary, ids) == layout
    assert len(layout.frames) == 3
    read = ids[layout.visual_index].numpy() - vocabulary.visual_start
    assert np.array_equal(read.reshape(codes.shape), codes)


def test_the_release_sequence_token_by_token():
    v = Vocabulary.lumos1()
    ids, _ = build_sequence(v, [11, 12], np.arange(16).reshape(1, 4, 4), fps=1)
    rows = [[65536 + 4 * r + c for c in range(4)] + [8803] for r in range(4)]
    frame = [8197, 8805, 8805, *functools.reduce(operator.iadd, rows, []), 8196]
    assert ids.tolist() == [0, 11, 12, 8710, 9004, 8805, 8805, *frame, 9005, 8710]


def test_rope_variants_differ_as_their_names_say():
    _, layout = build_sequence(VOCABULARY, [1, 2], np.zeros((2, 2, 3), dtype=int), fps=12)
    first, second = (frame.grid_start for frame in layout.frames)
    assert position_ids(layout, tiny_config(rope="1d"))[second].tolist() == [second] * 3
    assert position_ids(layout, tiny_config(rope="3d"))[second + 5].tolist() == [1, 1, 1]
    assert position_ids(layout, tiny_config(rope="m"))[second + 5].tolist() == [first + 1] * 3
    assert position_ids(layout, tiny_config())[second + 5].tolist() == [first + 4, first + 8, first + 8]


def test_frame_counts_are_one_plus_a_multiple_of_four():
    assert [num_latent_frames(n) for n in (1, 5, 17, 25)] == [1, 2, 5, 7]
    assert num_source_frames(7) == 25
    for bad in (0, 2, 16):
        with pytest.raises(ValueError, match="1 \\+ 4k"):
            num_latent_frames(bad)


def test_what_cannot_be_written_is_refused():
    good = np.zeros((1, 4, 4), dtype=int)
    with pytest.raises(ValueError, match="another visual tokenizer"):
        build_sequence(VOCABULARY, [1], good + 32, fps=12)
    with pytest.raises(ValueError, match="another text tokenizer"):
        build_sequence(VOCABULARY, [50], good, fps=12)
    with pytest.raises(ValueError, match="grid units"):
        build_sequence(Vocabulary.lumos1(), [1], good[:, :3], fps=12)
    with pytest.raises(ValueError, match=r"outside 0\.\.64"):
        build_sequence(VOCABULARY, [1], good, fps=65)
    with pytest.raises(ValueError, match=r"\[t, h, w\]"):
        build_sequence(VOCABULARY, [1], good[0], fps=12)
    with pytest.raises(ValueError, match="cut off"):
        parse(VOCABULARY, build_sequence(VOCABULARY, [1], good, fps=12)[0][:-8])


def test_positions_are_kept_whatever_the_default_device_was_when_they_were_asked_for():
    layout = video_layout(11, (2, 3, 5))
    with torch.device("meta"):
        assert position_ids(layout, tiny_config()).device.type == "cpu"
