import pytest

from pipelines.errors import UserError
from pipelines.training.accelerators import find_accelerator, parse_cluster


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("a100", "A100-80GB"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("Tesla T4", None),
        ("NVIDIA H100 PCIe", None),  # three quarters of the SXM card's FLOP/s
        ("NVIDIA GeForce RTX 4090 D", None),
        ("H100-40GB", None),
    ],
)
def test_a_device_is_found_by_our_name_and_by_cudas(name, found):
    device = find_accelerator(name)
    assert (device.name if device else None) == found


def test_a_cluster_is_a_number_and_a_device():
    cluster = parse_cluster("48xH20")
    assert (cluster.count, cluster.device.name, str(cluster)) == (48, "H20", "48 x H20")
    assert parse_cluster("8xA100-40GB").device.memory_gb == 40


@pytest.mark.parametrize("text", ["H20", "0xH20", "8xT4", "eight H100"])
def test_what_is_no_cluster_is_refused_with_the_devices_known(text):
    with pytest.raises(UserError, match="known: A100-40GB"):
        parse_cluster(text)
