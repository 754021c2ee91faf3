"""How the workers of a training reach each other.

Ray tells them the address of rank 0, but Gloo listens where the host's own name points. Where ``/etc/hosts`` gives that
name a loopback address, as Debian's does, workers of other nodes would knock at themselves.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig

_PASSED_ON = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_")  # what the variables of the driver begin with that workers get

_TorchBackend: Any = TorchConfig().backend_cls


def network_settings() -> dict[str, str]:
    """The settings of NCCL and Gloo in this process's environment."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address, as ``eth0``."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return str(name)
    return None


def settings_of_node(address: str) -> dict[str, str]:
    """What this node needs beside them, with the address by which Ray knows it."""
    try:
        by_name = socket.gethostbyname(socket.gethostname())
    except OSError:
        by_name = "127.0.0.1"
    interface = interface_of(address)
    misled = by_name.startswith("127.") and not address.startswith("127.")
    return {"GLOO_SOCKET_IFNAME": interface} if misled and interface else {}


def _set(passed_on: Mapping[str, str]) -> None:
    settings = settings_of_node(ray.util.get_node_ip_address())
    os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    os.environ.update(passed_on)


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: "NetworkConfig") -> None:
        """Before the workers look for each other."""
        worker_group.execute(_set, backend_config.settings)
        super().on_start(worker_group, backend_config)


@dataclass
class NetworkConfig(TorchConfig):
    """Ray's, with the driver's settings of NCCL and Gloo passed on, and each node's own interface."""

    settings: Mapping[str, str] = field(default_factory=network_settings)

    @property
    def backend_cls(self) -> Any:
        """What Ray starts."""
        return _Backend
