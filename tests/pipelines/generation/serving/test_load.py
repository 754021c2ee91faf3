"""Many clients at once, each answer held against what was asked; a minute of it is `lumos benchmark load`."""

import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.benchmarks.load import LoadConfig, run_load
from pipelines.errors import UserError
from pipelines.generation.config import BatchConfig, ServeConfig
from tests.pipelines.generation.conftest import free_port
from tests.pipelines.generation.serving.in_process import listening


@pytest.mark.parametrize("jobs", [False, True])
def test_under_load_every_request_is_answered_by_its_video_or_a_refusal(
    serve_config: ServeConfig, tmp_path: Path, jobs: bool
) -> None:
    config = replace(serve_config, jobs=str(tmp_path), batch=BatchConfig(max_size=4, max_queued=8), max_jobs=8)
    with listening(config) as url:
        found = run_load(LoadConfig(url=url, clients=24, duration_s=2.0, jobs=jobs, request={"steps": 2}))
    assert found["wrong"] == []
    assert found["videos"] > 0
    assert found["answers"].keys() <= {"200", "503", "accepted"}
    assert found["answers"]["503"] > 0  # the queue is bounded


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "http://127.0.0.1:port"])
def test_where_no_service_answers_that_is_told_at_once(url: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"^--url .*: no service answers there \(.*\); start one by `lumos serve`, or"):
        run_load(LoadConfig(url=url.format(port=free_port()), duration_s=600))
    assert time.monotonic() - begin < 5


def test_a_token_that_is_not_taken_is_told_at_once(serve_config: ServeConfig, tmp_path: Path) -> None:
    with listening(replace(serve_config, jobs=str(tmp_path), token="sesame")) as url:
        with pytest.raises(UserError, match=r"turns the token away; set LUMOS_SERVE_TOKEN"):
            run_load(LoadConfig(url=url, token="other", duration_s=600))
        found = run_load(LoadConfig(url=url, token="sesame", clients=1, duration_s=0.1, request={"steps": 1}))
    assert found["answers"] == {"200": found["videos"]}


class _Gone(BaseHTTPRequestHandler):
    """A service that goes away once it has said that it is there."""

    there = 200

    def do_GET(self) -> None:
        self.send_response(self.there)
        self.end_headers()

    def do_POST(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def test_a_service_that_goes_away_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gone) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            config = LoadConfig(url=f"http://127.0.0.1:{server.server_port}", clients=3, duration_s=0.5)
            found = run_load(config)
            monkeypatch.setattr(_Gone, "there", 404)
            with pytest.raises(UserError, match="what answers there is no service of `lumos serve`"):
                run_load(config)
        finally:
            server.shutdown()
    assert found["answers"] == {"no answer": 3}
    assert len(found["wrong"]) == 3
