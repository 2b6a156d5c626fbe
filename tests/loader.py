"""A closed loop: so many connections that each ask again as soon as they are answered, and connect again as soon as they are refused.

    python tests/loader.py PORT CONNECTIONS SECONDS PATH

prints JSON: answers by status, `failed` (no answer, or a broken one), and the 99th percentile of the seconds that a 200 took.
"""

import asyncio
import collections
import json
import sys
import time

import uvloop

counts = collections.Counter[str]()
took: list[float] = []


class Loop(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self.request, self.answer, self.ended = request, b"", asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.asked = time.perf_counter()
        self.transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.answer += data
        head, parted, body = self.answer.partition(b"\r\n\r\n")
        if parted and len(body) == int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]):
            status = head[9:12].decode()
            counts[status] += 1
            if status == "200":
                took.append(time.perf_counter() - self.asked)
            elif b"retry-after: " not in head:
                counts["failed"] += 1
            self.answer = b""
            if b"connection: close" in head:
                self.transport.close()
            else:
                self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        if self.answer or error:
            counts["failed"] += 1
        self.ended.set_result(None)


async def keep(port: int, request: bytes) -> None:
    while True:
        _, protocol = await asyncio.get_running_loop().create_connection(lambda: Loop(request), "127.0.0.1", port)
        await protocol.ended


async def main(port: int, connections: int, seconds: float, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    tasks = [asyncio.create_task(keep(port, request)) for _ in range(connections)]
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()
    print(json.dumps({**counts, "p99": sorted(took)[int(len(took) * 0.99)]}))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))
