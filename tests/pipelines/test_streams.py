import numpy as np

from pipelines.streams import numpy_stream, stream_seed, torch_stream


def test_streams_are_told_apart_by_seed_and_names():
    seeds = {
        stream_seed(0, "mask", 1, 2),
        stream_seed(1, "mask", 1, 2),
        stream_seed(0, "mask", 2, 1),
        stream_seed(0, "mask", 12),
        stream_seed(0, "mask", "1", 2),
        stream_seed(0, "caption", 1, 2),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert np.array_equal(numpy_stream(3, "a").random(4), numpy_stream(3, "a").random(4))
    assert torch_stream(3, "a").initial_seed() == torch_stream(3, "a").initial_seed()
