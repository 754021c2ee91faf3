"""The service by clients that others wrote: OpenAI's, unchanged, and schemathesis over all of OpenAPI."""

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pipelines.generation.config import BatchConfig, ServeConfig
from pipelines.generation.serving.pictures import decode_frames
from tests.pipelines.generation.conftest import CAPTIONS
from tests.pipelines.generation.serving.in_process import listening
from tests.pipelines.generation.serving.test_jobs import png

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled")


@pytest.fixture(scope="module")
def service(serve_config: ServeConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    jobs = str(tmp_path_factory.mktemp("jobs"))
    config = replace(serve_config, jobs=jobs, token="sesame", max_steps=8, batch=BatchConfig(max_size=8, max_queued=64))
    with listening(config) as url:
        yield url


def test_the_openai_client_makes_fetches_lists_continues_and_deletes_videos(service: str, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{service}/v1", api_key="sesame")
    video = client.videos.create_and_poll(prompt=CAPTIONS[0], size="32x32", seconds="1", poll_interval_ms=50)  # type: ignore[arg-type]
    assert (video.status, video.progress, video.size, video.object) == ("completed", 100, "32x32", "video")
    content = client.videos.download_content(video.id)
    content.write_to_file(tmp_path / "video.mp4")
    assert len(decode_frames((tmp_path / "video.mp4").read_bytes())) == 13
    assert client.videos.download_content(video.id, variant="thumbnail").read().startswith(b"\xff\xd8")
    begun = client.videos.create_and_poll(
        prompt=CAPTIONS[1], input_reference=("start.png", io.BytesIO(png()), "image/png"), extra_body={"seed": 3}
    )
    assert begun.status == "completed"
    # This client sends files alone, whatever its types say; the id has to come by the side.
    longer = client.videos.extend(
        prompt=CAPTIONS[0], seconds="1", video=("video.mp4", client.videos.download_content(begun.id).read())
    )  # type: ignore[arg-type]
    longer = client.videos.poll(longer.id)
    assert (longer.status, longer.seconds) == ("completed", f"{13 / 12:.4g}")
    assert [found.id for found in client.videos.list(limit=1)] == [longer.id, begun.id, video.id]  # three pages
    assert client.videos.retrieve(video.id).status == "completed"
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError, match="is not served here; there are: export"):
        client.videos.create(prompt="x", model="sora-2")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service}/v1", api_key="wrong", max_retries=0).videos.list()
    (image,) = client.images.generate(prompt=CAPTIONS[0], size="32x32").data or []  # type: ignore[arg-type]
    assert image.b64_json
    assert [model.id for model in client.models.list()] == ["export"]


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def test_no_request_that_openapi_allows_meets_a_5xx_or_what_it_does_not_tell(service: str) -> None:
    schema = schemathesis.openapi.from_url(f"{service}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 14
    for operation, mode in product(operations, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)):

        @settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(mode))
        def run(case: schemathesis.Case) -> None:
            response = case.call(base_url=service, headers={"Authorization": "Bearer sesame"}, timeout=60)
            case.validate_response(response, checks=CHECKS)

        with suppress(Unsatisfiable):  # nothing wrong can be sent to a path without parameters
            run()


def test_ranges_of_a_video_are_answered_as_openapi_tells(service: str) -> None:
    client = openai.OpenAI(base_url=f"{service}/v1", api_key="sesame")
    video = client.videos.create_and_poll(prompt=CAPTIONS[0], poll_interval_ms=50, extra_body={"steps": 1})
    schema = schemathesis.openapi.from_url(f"{service}/openapi.json")
    for method, wanted, status in (
        ("GET", "bytes=0-1", 206),
        ("GET", "bytes=999999999-", 416),
        ("GET", "bytes=0-1,3-4", 200),
        ("HEAD", "bytes=0-1", 200),
    ):
        operation = schema["/v1/videos/{video_id}/content"][method]
        case = operation.Case(path_parameters={"video_id": video.id}, headers={"Range": wanted})
        response = case.call(base_url=service, headers={"Authorization": "Bearer sesame"}, timeout=60)
        assert response.status_code == status
        assert str(status) in operation.definition.raw["responses"]
        case.validate_response(response, checks=CHECKS)
