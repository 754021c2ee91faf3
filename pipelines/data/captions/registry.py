"""The captioners that there are."""

from collections.abc import Mapping

from pipelines.data.captions.captioner import Captioner
from pipelines.data.captions.coca import COCA
from pipelines.data.captions.endpoint import ENDPOINT
from pipelines.data.captions.given import GIVEN
from pipelines.data.plugins import offered
from pipelines.errors import UserError

_ALL: tuple[Captioner, ...] = (GIVEN, COCA, ENDPOINT, *offered("CAPTIONERS"))
CAPTIONERS: Mapping[str, Captioner] = {captioner.name: captioner for captioner in _ALL}
if len(CAPTIONERS) < len(_ALL) or len({captioner.stage_name for captioner in _ALL}) < len(_ALL):
    raise UserError(
        "LUMOS_CAPTIONERS adds a captioner whose name or stage_name there is already; known: "
        + ", ".join(f"{captioner.name} ({captioner.stage_name})" for captioner in (GIVEN, COCA, ENDPOINT))
    )


def captioner_named(name: str) -> Captioner:
    """A captioner.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in CAPTIONERS:
        raise UserError(f"captions.captioners: there is no captioner {name!r}; name one of {', '.join(CAPTIONERS)}")
    return CAPTIONERS[name]
