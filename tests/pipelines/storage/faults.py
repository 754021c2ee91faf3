"""An S3 server, and a proxy before it that lets a share of the requests fail, in the ways in which stores fail."""

import asyncio
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

PAGE_KEYS = 100  # of a listing; real stores have 1,000, of which a test would have to write more
_PIECE = 1 << 16
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
# How a request may fail. Those of the second half reach the server: what they asked for is done, unknown to who asked.
KINDS = (
    "reset_upload",  # connection reset in the middle of the request's body (where it has one)
    "slow_down",  # 503
    "stalled",  # no answer, ever
    "reset",  # connection reset instead of an answer
    "stalled_answer",  # half an answer, then nothing
    "lost_answer",  # done, and the connection reset instead of the answer
    "cut_answer",  # half an answer, then an orderly end
    "reset_answer",  # half an answer, then a reset
)


@dataclass
class Head:
    """A request's or answer's first lines."""

    first: str
    fields: list[tuple[str, str]]

    def __getitem__(self, name: str) -> str:
        return next((value for key, value in self.fields if key.lower() == name), "")

    def to_bytes(self, **replaced: str) -> bytes:
        kept = [(key, value) for key, value in self.fields if key.lower() not in replaced]
        lines = [self.first, *(f"{key}: {value}" for key, value in [*kept, *replaced.items()] if value)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """None at the end of the connection."""
    try:
        data = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = data.decode("latin-1").rstrip("\r\n").split("\r\n")
    return Head(first, [(key, value.strip()) for key, _, value in (line.partition(":") for line in lines)])


async def read_chunks(reader: asyncio.StreamReader) -> bytes:
    """A body in chunked encoding, decoded."""
    body = b""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    while (await reader.readline()).strip():
        pass
    return body


class FaultyProxy:
    """Forwards HTTP/1.1 with connections kept alive and bodies streamed, and now and then does not.

    Attributes:
        share: Of requests that fail: one, chosen by the seed, of every 1 / share with a body, and of those without.
        kinds: Ways in which they do, taken in turn, so that all of them occur.
        requests: Requests seen, by method.
        faults: Requests that failed, by kind.
        paths: Their first lines.
        sent: Bytes of answers' bodies.
        answer: If set, what every request is answered with: status line and body.
    """

    def __init__(
        self,
        upstream: int,
        *,
        share: float = 0.0,
        seed: int = 0,
        kinds: Sequence[str] = KINDS,
        host: str = "127.0.0.1",
        upstream_host: str = "127.0.0.1",
    ) -> None:
        self.upstream, self.upstream_host, self.host = upstream, upstream_host, host
        self.share = share
        self.kinds = kinds
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.paths: list[str] = []
        self.sent = 0
        self.answer: tuple[str, bytes] | None = None
        self.port = 0
        self._random = random.Random(seed)
        self._blocks: defaultdict[tuple[float, bool], list[bool]] = defaultdict(list)  # of the requests to come

    async def serve(self, ready: Callable[[], None], end: asyncio.Event) -> None:
        server = await asyncio.start_server(self._connection, self.host, 0, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        ready()
        await end.wait()
        server.close()
        for task in (others := asyncio.all_tasks() - {asyncio.current_task()}):
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while (head := await read_head(reader)) is not None and await self._exchange(head, reader, writer):
                pass
        writer.close()

    async def _exchange(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection goes on."""
        self.requests[head.first.split()[0]] += 1
        self.paths.append(head.first)
        if head["expect"]:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(head["content-length"] or 0)
        kind = self._fault(length)
        if kind == "reset_upload":
            await reader.readexactly(length // 2)
            return _reset(writer)
        body = await (read_chunks(reader) if "chunked" in head["transfer-encoding"] else reader.readexactly(length))
        if kind == "stalled":
            return await _silence(reader)
        if kind == "reset":
            return _reset(writer)
        if kind == "slow_down" or self.answer:
            status, words = self.answer or ("503 Slow Down", _SLOW_DOWN)
            words = b"" if head.first.startswith("HEAD") else words
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(words)}\r\n\r\n".encode() + words)
            await writer.drain()
            return True
        return await self._forward(kind, head, body, reader, writer)

    def _fault(self, length: int) -> str | None:
        if not self.share:
            return None
        block = self._blocks[self.share, length > 1]
        if not block:
            block += [True] + [False] * (round(1 / self.share) - 1)
            self._random.shuffle(block)
        if not block.pop():
            return None
        fitting = [kind for kind in self.kinds if length > 1 or kind != "reset_upload"]
        kind = min(fitting, key=lambda kind: self.faults[kind])
        self.faults[kind] += 1
        return kind

    async def _forward(
        self, kind: str | None, head: Head, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        from_server, to_server = await asyncio.open_connection(self.upstream_host, self.upstream, limit=1 << 20)
        try:
            to_server.write(head.to_bytes(**{"connection": "close", "expect": "", "transfer-encoding": ""}) + body)
            answer = await read_head(from_server)
            if answer is None or kind == "lost_answer":
                return _reset(writer)
            empty = head.first.startswith("HEAD") or answer.first.split()[1] in ("204", "304")
            if "chunked" in answer["transfer-encoding"]:
                whole = await read_chunks(from_server)
                from_server, length = asyncio.StreamReader(), len(whole)  # on it goes as one body of known length
                from_server.feed_data(whole)
            else:
                length = 0 if empty else int(answer["content-length"] or 0)
            declared = {} if empty else {"content-length": str(length)}
            start = answer.to_bytes(**{"connection": "", "transfer-encoding": "", **declared})
            if kind is None:
                writer.write(start)
                await _copy(from_server, writer, length)
                self.sent += length
                return True
            if length > 1:
                writer.write(start)
                await _copy(from_server, writer, length // 2)
            else:
                writer.write(start[: len(start) // 2])
                await writer.drain()
            if kind == "stalled_answer":
                return await _silence(reader)
            if kind == "reset_answer":
                await asyncio.sleep(0.05)  # for what was sent to arrive before the reset discards it
                return _reset(writer)
            return False
        finally:
            to_server.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int) -> None:
    while length:
        piece = await reader.read(min(length, _PIECE))
        if not piece:
            raise ConnectionResetError("the server's answer ended early")
        writer.write(piece)
        await writer.drain()
        length -= len(piece)
    await writer.drain()


async def _silence(reader: asyncio.StreamReader) -> bool:
    """Nothing, until the client hangs up."""
    while await reader.read(_PIECE):
        pass
    return False


def _reset(writer: asyncio.StreamWriter) -> bool:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


@contextmanager
def s3_server() -> Iterator[int]:
    """An S3 server (moto) in a process of its own, empty; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    env = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE_KEYS)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, "moto did not start"
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def faulty_proxy(
    upstream: int, *, share: float = 0.0, seed: int = 0, host: str = "127.0.0.1", upstream_host: str = "127.0.0.1"
) -> Iterator[FaultyProxy]:
    """A proxy in a thread that listens at the host, before a server on a port of this or another machine."""
    proxy = FaultyProxy(upstream, share=share, seed=seed, host=host, upstream_host=upstream_host)
    loop, end, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy.serve(ready.set, end)), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(10)
