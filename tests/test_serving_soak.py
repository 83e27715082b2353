"""Ten thousand requests, a fifth of whose clients leave at a random moment: no block, no memory is lost."""

import asyncio
import json
import random
import time
from pathlib import Path

import pytest
from helpers.generate_command import folder
from helpers.serving import RunningServer, running_server

__all__ = ["folder"]

REQUESTS, CLIENTS = 10_000, 48
WARM_UP = 3_000
"""Requests until caches of the allocator and of the prefix are full."""


async def request(server: RunningServer, dice: random.Random) -> str:
    """Sends one request; returns "left", or the status of the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    prompt = [1] + [dice.randrange(3, 300) for _ in range(dice.randrange(1, 60))]
    fields = {"prompt": prompt, "max_tokens": dice.randrange(1, 40), "stream": dice.random() < 0.5}
    body = json.dumps(fields | {"n": dice.randrange(1, 3), "ignore_eos": True}).encode()
    head = ["POST /v1/completions HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    writer.write("\r\n".join([*head, "Connection: close", "", ""]).encode() + body)
    try:
        if dice.random() < 0.2:
            await asyncio.sleep(dice.random() * 0.2)
            return "left"
        answer = await reader.read()
        return answer.split(b" ", 2)[1].decode()
    finally:
        writer.close()


async def soak(server: RunningServer, count: int, seed: int) -> dict[str, int]:
    """Sends `count` requests by `CLIENTS` clients; returns how many ended how."""
    numbers, ends = iter(range(count)), {}

    async def client(number: int) -> None:
        dice = random.Random(seed * 1000 + number)
        for _ in numbers:
            end = await request(server, dice)
            ends[end] = ends.get(end, 0) + 1

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return ends


def resident(server: RunningServer) -> int:
    """KiB of the server's memory."""
    lines = Path(f"/proc/{server.processes[0].pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.slow
def test_ten_thousand_requests(folder, tmp_path):
    flags = ["--cache-memory", "0.0015", "--block-size", "8", "--max-num-seqs", "24", "--max-queue", "200"]
    with running_server(folder, tmp_path, *flags) as server:
        asyncio.run(soak(server, WARM_UP, 1))
        before = resident(server)
        ends = asyncio.run(soak(server, REQUESTS - WARM_UP, 2))
        deadline = time.monotonic() + 60
        while server.metric("num_requests_running") + server.metric("num_requests_waiting"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        print(ends, before, resident(server), server.metric("num_preemptions_total"))
        assert server.metric("kv_cache_usage_perc") == 0
        assert ends.keys() == {"200", "left"}
        assert resident(server) < 1.02 * before
        assert server.metric("num_preemptions_total") > 0
