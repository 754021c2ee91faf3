"""The service as Ray Serve's own config files name it: ``import_path: jobs.serve_application:build``.

For who starts Serve otherwise than by ``lumos serve``, as KubeRay's RayService does: Serve's config then says where to
listen, and how many replicas run on a node. Its ``controller_options`` should be those of
``infra/cluster/kuberay/rayservice.yaml``: without them Serve's proxies answer 500 to an ``x-request-id`` that is no
UTF-8, and take over whatever else a client sends as one.
"""

from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from pipelines.config import load_config
from pipelines.errors import UserError

_ARGS = {"config", "overrides"}


def build(args: Mapping[str, Any]) -> Application:
    """The application that ``lumos serve CONFIG KEY=VALUE...`` would run.

    Args:
        args: ``config``, a path or the name of a shipped config (default: ``default``), and ``overrides``, a list of
            ``key.path=value``. Its host decides whether a token is needed; it should be that of Serve's config.

    Raises:
        UserError: as ``lumos serve`` does before it starts.
    """
    from pipelines.generation.config import ServeConfig
    from pipelines.generation.serving.run import read_cards, service_deployment, with_token

    if unknown := sorted(set(args) - _ARGS):
        raise UserError(f"args: unknown {', '.join(unknown)}; there are {', '.join(sorted(_ARGS))}")
    config = with_token(load_config(ServeConfig, args.get("config", "default"), args.get("overrides", ())))
    return service_deployment(read_cards(config), config)
