import pickle
import signal
import socket
import threading
import time
from collections import Counter

import pytest
from tenacity import wait_random_exponential

from pipelines.data.captions import endpoint as endpoint_module
from pipelines.data.captions.endpoint import CaptionEndpoint, CaptionRequest, EndpointConfigError, EndpointDownError
from pipelines.data.settings import EndpointConfig
from tests.pipelines.data.vision_server import MODEL, VisionServer, caption_of, card, fault_plan

# What anyio leaves when a request is cancelled while it connects.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'connect_tcp:RuntimeWarning")

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint_module, "_BACKOFF", wait_random_exponential(multiplier=0.05, max=30))
    monkeypatch.setattr(endpoint_module, "_PROBE_SECONDS", 0.2)


@pytest.fixture
def server():
    with VisionServer() as server:
        yield server


def client(server, api_key=None, **settings):
    return CaptionEndpoint(
        EndpointConfig(**{"url": server.url, "model": MODEL, "timeout_seconds": 5} | settings), api_key
    )


def requests(numbers):
    for number in numbers:
        yield CaptionRequest(f"clip-{number}", (card(number), card(number)))


def number_of(answer):
    return int(answer.key.removeprefix("clip-"))


def right(answers):
    """Whether each is the caption of its own clip."""
    return all(not a.failure and a.caption == caption_of(number_of(a)) for a in answers)


OTHERS: set[threading.Thread] = set()  # threads that tests of other modules left in this process, such as s3fs's


@pytest.fixture(autouse=True)
def others():
    OTHERS.update(threading.enumerate())


def no_thread_left():
    return not [thread for thread in set(threading.enumerate()) - OTHERS if thread.name.startswith("asyncio")]


def test_caption_identity_under_faults_every_caption_is_on_its_own_clip_and_none_is_lost(server):
    numbers = [n * 37 % 60000 for n in range(200)]
    server.retry_after = "0.02"
    server.faults = fault_plan(numbers, seed=0)
    planned = Counter(fault for faults in server.faults.values() for fault in faults)
    assert min(planned.values()) > 15, planned
    assert len(planned) == 7
    endpoint = client(server, concurrency=16, max_tries=8, timeout_seconds=60)
    answers = endpoint.run(requests(numbers))
    assert right(answers)
    assert [number_of(answer) for answer in answers] == numbers
    assert len(server.seen) >= 200 + sum(planned.values())
    assert sum(answer.input_tokens for answer in answers) == 100 * server.billed > 100 * 200
    assert not any(server.faults.values())
    assert no_thread_left()


def test_starts_are_paced_across_all_requests_and_runs(server):
    server.delay = 0.2
    endpoint = client(server, requests_per_minute=2000)  # one in 30 ms
    began = [time.monotonic()]
    assert right([*endpoint.run(requests(range(10))), *endpoint.run(requests(range(10, 20)))])
    time.sleep(0.3)  # what is not used now is no credit for later
    began.append(time.monotonic())
    assert right(endpoint.run(requests(range(20, 30))))
    times = sorted(seen.time for seen in server.seen)
    for begin, arrivals in zip(began, (times[:20], times[20:]), strict=True):
        assert all(arrival >= begin + 0.97 * 0.03 * n for n, arrival in enumerate(arrivals))


def test_no_more_are_in_flight_than_allowed_and_no_fewer(server):
    server.delay = 0.05
    assert right(client(server, concurrency=5).run(requests(range(60))))
    assert server.most_flying == 5


def test_requests_are_taken_lazily_and_a_slow_one_stalls_no_others(server):
    server.always = {0: "hang"}
    arrived = []  # when each clip is taken: how many the server has seen

    def source():
        for request in requests(range(40)):
            arrived.append(len(server.seen))
            yield request

    first, *others = client(server, concurrency=2, max_tries=1, timeout_seconds=2).run(source())
    assert first.failure == "caption_unanswered"
    assert right(others)
    assert all(taken - seen <= 1 for taken, seen in enumerate(arrived))


def test_a_400_is_that_clips_alone_and_not_tried_again(server):
    server.always = {7: "400"}
    answers = client(server).run(requests(range(20)))
    refusal = answers.pop(7)
    assert (refusal.key, refusal.failure, refusal.caption) == ("clip-7", "caption_refused", "")
    assert right(answers)
    assert len(server.seen) == 20


def test_a_400_to_every_clip_stops_the_run(server):
    server.always = {None: "400"}
    with pytest.raises(EndpointConfigError, match=r"HTTP 400: .*bad picture"):
        client(server).run(requests(range(20)))


@pytest.mark.parametrize("status", ["401", "404", "307"])
def test_a_refused_key_or_address_stops_at_once_and_says_what_to_check(server, status):
    server.always = {None: status}
    with pytest.raises(EndpointConfigError) as caught:
        client(server, api_key=KEY, api_key_env="SEER_KEY").run(requests(range(500)))
    told = str(caught.value)
    for part in (server.url, MODEL, f"HTTP {status}", "captions.endpoint.url", "SEER_KEY (set)", "***"):
        assert part in told
    assert KEY not in told
    assert len(server.seen) <= 8
    assert no_thread_left()


def test_the_key_is_sent_only_where_there_is_one(server, monkeypatch):
    monkeypatch.setenv("SEER_KEY", f"{KEY}\n")
    config = EndpointConfig(url=server.url, model=MODEL, api_key_env="SEER_KEY")
    assert right(CaptionEndpoint(config, config.read_api_key()).run(requests([1])))
    monkeypatch.delenv("SEER_KEY")
    assert right(CaptionEndpoint(config, config.read_api_key()).run(requests([2])))
    first, second = server.seen
    assert first.headers["Authorization"] == f"Bearer {KEY}"
    assert "Authorization" not in second.headers
    assert first.headers["X-Request-Id"] == first.id != second.id
    with pytest.raises(EndpointConfigError) as caught:
        CaptionEndpoint(config, "sk-pasted\u2026")
    assert "pasted" not in str(caught.value)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_endpoint_that_comes_up_later_is_waited_for_without_using_up_tries():
    server = VisionServer(port=free_port())
    late = threading.Timer(0.5, server.__enter__)
    late.start()
    endpoint = client(server, max_tries=2, patience_seconds=30)
    answers = endpoint.run(requests(range(30)))
    late.join()
    server.__exit__()
    assert right(answers)


@pytest.mark.parametrize("fault", ["refused", "500", "429", "hang"])
def test_an_endpoint_that_stays_down_stops_the_run_within_patience(server, fault):
    server.always = {None: fault}
    server.retry_after = "3600"
    address = VisionServer(port=free_port()) if fault == "refused" else server
    seconds = 0.2 if fault == "hang" else 5
    endpoint = client(address, api_key=KEY, patience_seconds=0.6, timeout_seconds=seconds, max_tries=3)
    began = time.monotonic()
    with pytest.raises(EndpointDownError) as caught:
        endpoint.run(requests(range(50)))
    assert 0.55 < time.monotonic() - began < 30
    told = str(pickle.loads(pickle.dumps(caught.value)))
    last = {
        "refused": "ConnectError",
        "500": "HTTP 500",
        "429": "HTTP 429, Retry-After 3600",
        "hang": "no answer within 0.2 s",
    }[fault]
    for part in (address.url, last, "patience_seconds is 0.6", "same command"):
        assert part in told
    assert KEY not in told
    assert no_thread_left()


def test_an_endpoint_that_goes_down_midway_loses_none(server):
    def source():
        for number, request in enumerate(requests(range(80))):
            if number == 20:
                server.always[None] = "500"
                threading.Timer(1.0, server.always.clear).start()
            yield request

    assert right(client(server, max_tries=4, patience_seconds=60).run(source()))
    assert len(server.seen) > 82


@pytest.mark.parametrize("fault", ["500", "drop", "hang"])
def test_a_clip_that_breaks_the_endpoint_is_no_endpoint_that_is_down_even_as_the_last(server, fault):
    server.always = {4: fault, 5: fault}
    endpoint = client(server, max_tries=3, patience_seconds=60, timeout_seconds=1 if fault == "hang" else 10)
    *answers, broken, last = endpoint.run(requests(range(6)))
    assert right(answers)
    for refusal in (broken, last):
        assert refusal.failure == "caption_unanswered"


@pytest.mark.parametrize(
    ("fault", "failure", "tries"),
    [
        ("malformed", "caption_malformed", 2),
        ("empty", "caption_malformed", 2),
        ("swap", "caption_mismatch", 2),
        ("length", "caption_truncated", 1),
        ("filter", "caption_refused", 1),
    ],
)
def test_answers_that_are_no_caption_of_the_clip_become_failures(server, fault, failure, tries):
    server.always = {3: fault}
    answers = client(server, max_tries=2, concurrency=1).run(requests(range(5)))
    failed = answers.pop(3)
    assert (failed.key, failed.failure, failed.caption) == ("clip-3", failure, "")
    assert failed.input_tokens == 100 * tries
    assert sum(seen.number == 3 for seen in server.seen) == tries
    assert right(answers)


@pytest.mark.parametrize(("after", "least"), [("0.6", 0.6), (2, 0.95)])  # an HTTP date is cut to whole seconds
def test_the_whole_client_waits_as_long_as_retry_after_says(server, after, least):
    server.faults, server.retry_after = {2: ["429"]}, after
    assert right(client(server, concurrency=1).run(requests(range(6))))
    refused = [seen.number for seen in server.seen].index(2)
    assert server.seen[refused + 1].time - server.seen[refused].time > least


def test_response_format_is_given_up_once_for_all_where_it_is_refused(server):
    server.always, server.fences = {None: "no_format"}, True
    endpoint = client(server, concurrency=2)
    assert right(endpoint.run(requests(range(10))))
    asked = ["response_format" in seen.body for seen in server.seen]
    assert 1 <= sum(asked) <= 2
    assert len(asked) == 10 + sum(asked)
    assert right(endpoint.run(requests([11])))
    assert "response_format" not in server.seen[-1].body


def test_an_answer_in_parts_is_put_together(server):
    server.always = {None: "parts"}
    assert right(client(server).run(requests(range(3))))


def test_tokens_of_failed_tries_count_too(server):
    server.faults = {1: ["malformed", "empty"], 2: ["500"]}
    answers = client(server).run(requests(range(4)))
    assert [answer.input_tokens for answer in answers] == [100, 300, 100, 100]
    assert [answer.output_tokens for answer in answers] == [10, 30, 10, 10]


def test_an_interrupted_run_ends_at_once_though_its_requests_hang(server):
    server.always = {None: "hang"}

    def interrupt():
        while len(server.seen) < 8:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        client(server, timeout_seconds=60).run(requests(range(40)))
    assert time.monotonic() - began < 30
    assert no_thread_left()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_or_interrupt_in_the_source_ends_the_run(server, error):
    def source():
        yield from requests(range(3))
        raise error

    server.always = {None: "hang"}
    began = time.monotonic()
    with pytest.raises(error):
        client(server, timeout_seconds=60).run(source())
    assert time.monotonic() - began < 30
    assert no_thread_left()


def test_check_finds_what_would_fail(server):
    client(server).check()
    server.models = tuple("abcdefg")
    with pytest.raises(EndpointConfigError, match=r"no model 'seer' but a, b, c, d, e and others; correct"):
        client(server).check()
    for status in (401, 403):
        server.models_status = status
        with pytest.raises(EndpointConfigError, match=f"HTTP {status}.*OPENAI_API_KEY"):
            client(server).check()
    server.models_status = 404
    client(server).check()
    with pytest.raises(EndpointConfigError, match=r"no endpoint answers at .*ConnectError"):
        client(VisionServer(port=free_port())).check()
    assert server.seen == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "127.0.0.1:8000"}, "url must be like http://"),
        ({"url": "http://h/v1/chat/completions"}, "url must end before"),
        ({"url": "http://h/v1", "model": ""}, "model is empty"),
        ({"concurrency": 0}, "concurrency must be in 1..1024, got 0"),
        ({"requests_per_minute": 0}, "requests_per_minute must be positive"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds must be positive"),
        ({"max_tries": 0}, "max_tries must be at least 1"),
        ({"patience_seconds": 0}, "patience_seconds must be positive"),
        ({"input_price": -1}, "input_price must not be negative"),
        ({"prompt": " "}, "prompt is empty"),
    ],
)
def test_settings_out_of_range_are_named(settings, told):
    with pytest.raises(ValueError, match=told):
        EndpointConfig(**{"model": MODEL} | settings)


@pytest.mark.parametrize(
    "settings",
    [{"url": f"http://me:{KEY}@h/v1"}, {"url": f"https://h/v1?key={KEY}"}, {"api_key_env": KEY}],
)
def test_secrets_are_refused_in_the_settings_and_not_repeated(settings):
    with pytest.raises(ValueError, match="key") as caught:
        EndpointConfig(**{"model": MODEL} | settings)
    assert KEY not in str(caught.value)
