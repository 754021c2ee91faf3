"""First weights of a run from an object store that fails now and then."""

import torch

from pipelines.training.initialize import check_init_from
from tests.pipelines.training.foreign import VOCABULARY, small_model, write_llama
from tests.pipelines.training.test_initialize import first_weights


def test_weights_are_read_from_a_store_that_fails_now_and_then(tmp_path, bucket, direct, proxy):
    state = write_llama(tmp_path / "llama")
    direct.put(str(tmp_path / "llama"), f"{bucket}/models/", recursive=True)
    proxy.share = 0.05
    check_init_from(f"{bucket}/models/llama", small_model(), VOCABULARY)
    ours = first_weights(tmp_path, small_model(), VOCABULARY, f"{bucket}/models/llama")
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(ours[key], state[key])
    assert any("model.safetensors" in path for path in proxy.paths)
