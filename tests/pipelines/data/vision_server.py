"""A real HTTP server that captions by what it sees, and fails as it is told."""

import base64
import json
import random
import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np

BITS, BLOCK = 16, 16  # blocks in a picture, px of a block
MODEL = "seer"
FAULTS = ("500", "503", "429", "drop", "swap", "malformed", "empty")
STATUSES = {"307": "elsewhere", "400": "bad picture", "401": "no such key", "404": "no such model", "500": "oops"}


def card(number):
    """A JPEG of black and white blocks that spell a number, coarse enough to survive compression."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8).reshape(4, 4)
    image = np.kron(20 + 210 * bits, np.ones((BLOCK, BLOCK), np.uint8)).astype(np.uint8)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes()


def read_card(jpeg):
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    bits = image.reshape(4, BLOCK, 4, BLOCK).mean((1, 3)).ravel() > 127
    return sum(1 << bit for bit, one in enumerate(bits) if one)


def caption_of(number):
    return f'A card, held up "still", that spells {number}.'


def fault_plan(numbers, seed, most=3):
    """For about half of the clips, the faults of their first tries."""
    draw = random.Random(seed)
    return {n: draw.choices(FAULTS, k=draw.randint(1, most)) for n in numbers if draw.random() < 0.5}


@dataclass
class Seen:
    """One POST."""

    time: float
    number: int
    id: str
    headers: dict
    body: dict


@dataclass
class VisionServer:
    """Told what to do by its attributes, which tests may change while it runs.

    ``faults`` are used up try by try for each number; ``always`` is one that stays, for a number or for all (None).
    """

    faults: dict = field(default_factory=dict)
    always: dict = field(default_factory=dict)
    delay: float = 0.02  # seconds, at most
    retry_after: object = "0.1"
    models: tuple = (MODEL,)
    models_status: int = 200
    fences: bool = False
    port: int = 0
    seen: list = field(default_factory=list)
    flying: int = 0
    most_flying: int = 0
    billed: int = 0  # answers with tokens

    def __post_init__(self):
        self.lock = threading.Lock()
        self.draw = random.Random(0)
        self.over = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def note(self, seen):
        """Record a request; returns its fault and another that came before it, if any."""
        with self.lock:
            others = [other for other in self.seen[-20:] if other.number != seen.number]
            self.seen.append(seen)
            planned = self.faults.get(seen.number)
            fault = planned.pop(0) if planned else self.always.get(seen.number, self.always.get(None))
            return fault, self.draw.choice(others) if others else None, self.draw.random() * self.delay

    @contextmanager
    def fly(self):
        with self.lock:
            self.flying += 1
            self.most_flying = max(self.most_flying, self.flying)
        try:
            yield
        finally:
            with self.lock:
                self.flying -= 1

    def __enter__(self):
        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True
            block_on_close = False
            vision = self

            def handle_error(self, *_):
                """A client that hangs up is no news."""

        self.http = Server(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        vision = self.server.vision
        self.reply(vision.models_status, {"data": [{"id": name} for name in vision.models]})

    def do_POST(self):
        now, vision = time.monotonic(), self.server.vision
        with vision.fly():
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            parts = body["messages"][0]["content"]
            id = re.search(r'"id": "(\w+)"', parts[0]["text"])[1]
            images = [part["image_url"]["url"] for part in parts[1:]]
            numbers = {read_card(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))) for url in images}
            (number,) = numbers  # all frames of one clip
            seen = Seen(now, number, id, dict(self.headers), body)
            fault, other, delay = vision.note(seen)
            time.sleep(delay)
            self.behave(seen, fault, other)

    def behave(self, seen, fault, other):
        if fault in STATUSES:
            told = STATUSES[fault] + " " + str(self.headers["Authorization"])  # servers do echo keys
            self.reply(int(fault), {"error": {"message": told}})
        elif fault in ("503", "429"):
            after = self.server.vision.retry_after
            value = formatdate(time.time() + after, usegmt=True) if isinstance(after, int) else after
            self.reply(int(fault), {"error": {"message": "later"}}, {"Retry-After": value})
        elif fault == "no_format" and "response_format" in seen.body:
            self.reply(400, {"error": {"message": "response_format is not supported"}})
        elif fault == "drop":
            self.hang_up()
        elif fault == "hang":
            self.server.vision.over.wait(30)
            self.close_connection = True
        else:
            self.speak(seen, fault, other)

    def speak(self, seen, fault, other):
        if fault == "swap" and other is not None:
            self.answer(other.id, caption_of(other.number))
        elif fault in ("malformed", "swap"):
            self.complete("A card that spells something.")
        elif fault == "empty":
            self.answer(seen.id, " ")
        elif fault == "length":
            self.complete(json.dumps({"id": seen.id, "caption": "A card that"})[:-2], finish="length")
        elif fault == "parts":
            content = json.dumps({"id": seen.id, "caption": caption_of(seen.number)})
            self.complete(
                [{"type": "thinking"}, *({"type": "text", "text": half} for half in (content[:9], content[9:]))]
            )
        elif fault == "filter":
            self.complete(None, finish="content_filter")
        else:
            self.answer(seen.id, caption_of(seen.number))

    def hang_up(self):
        """In the middle of an answer."""
        self.send_response(200)
        self.send_header("Content-Length", "500")
        self.end_headers()
        self.wfile.write(b'{"choices": [{"mess')
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, id, caption):
        content = json.dumps({"id": id, "caption": caption})
        self.complete(f"Here it is:\n```json\n{content}\n```" if self.server.vision.fences else content)

    def complete(self, content, finish="stop"):
        with self.server.vision.lock:
            self.server.vision.billed += 1
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
        self.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})

    def reply(self, status, body, headers=()):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers, **{"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
