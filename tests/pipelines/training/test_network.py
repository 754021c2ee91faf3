import socket

import pytest

from pipelines.training import network


def test_a_host_whose_name_is_a_loopback_address_is_told_its_interface(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    assert network.interface_of("127.0.0.1") == "lo"
    monkeypatch.setattr(network, "interface_of", {"10.1.2.3": "eth7"}.get)
    assert network.settings_of_node("10.1.2.3") == {"GLOO_SOCKET_IFNAME": "eth7"}
    assert network.settings_of_node("10.9.9.9") == {}, "an address behind a translation has no interface here"
    assert network.settings_of_node("127.0.0.1") == {}, "all workers are here"
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "10.1.2.3")
    assert network.settings_of_node("10.1.2.3") == {}, "Gloo finds it"


def test_settings_of_the_network_are_passed_on_and_no_others(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NOT_OF_THE_NETWORK", "1")
    settings = network.NetworkConfig(backend="gloo").settings
    assert settings["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "NOT_OF_THE_NETWORK" not in settings


@pytest.mark.slow  # a training of its own
def test_settings_of_the_network_reach_the_workers(ray_cluster, monkeypatch):
    import os

    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    config = network.NetworkConfig(backend="gloo")
    trainer = TorchTrainer(
        lambda: os.environ.get("NCCL_SOCKET_IFNAME"), torch_config=config, scaling_config=ScalingConfig(num_workers=1)
    )
    assert trainer.fit().return_value == "ib0"
