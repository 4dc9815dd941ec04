"""A slow line in user space: TCP connections that share so many bits a second each way, and arrive so much later.

It shapes what is sent, not how TCP sends it: no packet is lost, and a window is never too small for the line.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from types import TracebackType

_READ = 1 << 16
_AHEAD_S = 0.02  # how far a direction may be booked ahead before its reader waits


class _Way:
    """One direction of the line."""

    def __init__(self, bytes_s: float, delay_s: float) -> None:
        self._bytes_s, self._delay_s, self._free, self.sent = bytes_s, delay_s, 0.0, 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.ensure_future(self._deliver(due, writer))
        with contextlib.suppress(OSError):
            while data := await reader.read(_READ):
                self._free = max(self._free, time.monotonic()) + len(data) / self._bytes_s
                self.sent += len(data)
                due.put_nowait((self._free + self._delay_s, data))
                if (ahead := self._free - time.monotonic()) > _AHEAD_S:
                    await asyncio.sleep(ahead)
        due.put_nowait((time.monotonic() + self._delay_s, b""))
        await delivering

    async def _deliver(self, due: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                at, data = await due.get()
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        writer.close()


class Line:
    """From a port of this machine to another one, in a thread of its own.

    Args:
        target: port of the server, on 127.0.0.1.
        bits_s: bits a second, each way.
        delay_s: seconds from one end to the other.
    """

    def __init__(self, target: int, *, bits_s: float, delay_s: float) -> None:
        self._target = target
        self._up, self._down = (_Way(bits_s / 8, delay_s) for _ in range(2))
        self._loop = asyncio.new_event_loop()
        self._open = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0

    @property
    def sent(self) -> tuple[int, int]:
        """Bytes to the server and from it, so far."""
        return self._up.sent, self._down.sent

    def __enter__(self) -> Line:
        self._thread.start()
        self._open.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._open.set()
        self._loop.run_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._up.carry(reader, far_writer), self._down.carry(far_reader, writer))
