"""A site's one long-lived process: claims messages from the SuperNode and answers them with installed code only.

Flower itself starts a new process for each message, which imports the bundle that the server sent. Here the base model stays
loaded, the bundle is hashed and dropped, and only an exception's code is sent.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fedlora.core.errors import ConnectionFailed, FedLoRAError, Oversized
from fedlora.core.messages import Reply, Request
from fedlora.flower._internals import Claimer, TaskClient, WrongSecret
from fedlora.flower.bundle import BUNDLE_SHA256
from fedlora.flower.libraries import Message
from fedlora.flower.records import dump_reply, flower_error, parse_request
from fedlora.gateway.addresses import LOOPBACK
from fedlora.processes.memory import give_back

log = logging.getLogger("fedlora.runner")

Handle = Callable[[Request], Reply]
"""``Site.handle``: answers a request; an error becomes the reply's code."""

_LONGEST_WAIT_S = 1.0


class Runner:
    """Answers messages until stopped. Survives a crash of the SuperNode.

    Args:
        port: the SuperNode's loopback port.
        site: this site's name.
        secret_file: holds the SuperNode's secret; read again when it is refused: it may have been replaced.
        handle: answers a request. Called in the thread that calls :meth:`run`, one at a time.
        max_bytes: larger requests are refused unread.
        poll_s: pause between two questions for work, seconds.
        heartbeat_s: between two signs of life while ``handle`` works, seconds; Flower gives up after 60.
        patience_s: how long to try to deliver an answer, seconds. After that it is lost for Flower; the journal has it.
        on_state: called after each poll with whether the SuperNode accepts this process, in the thread that calls :meth:`run`.
    """

    def __init__(
        self,
        port: int,
        *,
        site: str,
        secret_file: Path,
        handle: Handle,
        max_bytes: int,
        poll_s: float = 0.25,
        heartbeat_s: float = 10.0,
        patience_s: float = 30.0,
        on_state: Callable[[Literal["in", "away", "wrong-secret"]], None] = lambda state: None,
    ) -> None:
        self._address = f"{LOOPBACK}:{port}"
        self._site = site
        self._secret_file = secret_file
        self._on_state = on_state
        self._handle = handle
        self._max_bytes = max_bytes
        self._poll_s = poll_s
        self._heartbeat_s = heartbeat_s
        self._patience_s = patience_s
        self._working = False

    @property
    def working(self) -> bool:
        """True while ``handle`` runs."""
        return self._working

    def run(self, stop: threading.Event) -> None:
        """Answers messages until ``stop`` is set. Answers ``site-stopped`` and re-raises a KeyboardInterrupt of ``handle``."""
        claimer = self._claimer()
        wait, away = self._poll_s, ""
        while not stop.is_set():
            try:
                token = claimer.claim()
                if away:
                    log.info("the SuperNode is back")
                wait, away = self._poll_s, ""
                self._on_state("in")
                if token:
                    self._answer(token, stop)
                    continue
            except ConnectionFailed as e:
                refused = isinstance(e, WrongSecret)
                if away != str(e):
                    log.warning("waiting for the SuperNode: %s", e)
                if refused and away != str(e):  # what the file says now, before it is said
                    wait = self._poll_s
                else:
                    wait = min(2 * wait, _LONGEST_WAIT_S)
                    self._on_state("wrong-secret" if refused else "away")
                away = str(e)
                claimer.close()
                claimer = self._claimer()
            stop.wait(wait)

    def _claimer(self) -> Claimer:
        try:
            secret = self._secret_file.read_bytes()
        except OSError:
            secret = b""  # refused, and so said
        return Claimer("flwr-clientapp", address=self._address, secret=secret or b"-", ca=None)

    def _answer(self, token: str, stop: threading.Event) -> None:
        client = TaskClient(self._address, token=token, ca=None, patience_s=self._patience_s)
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(client, over), daemon=True)
        try:
            claim = client.start()
            beat.start()
            message = self._receive(client, over, stop)
            if message is None:
                # Never ended without a reply: the SuperNode would wait for one for ever. Its task expires in a minute.
                log.warning("a message did not reach this site")
                return
            ours = hashlib.sha256(claim.bundle).hexdigest() == BUNDLE_SHA256
            reply, interrupted = Reply(self._site, error="bundle-refused"), False
            if ours:
                give_back()  # what the parts of the message have taken
                try:
                    reply = self._reply_to(message)
                except KeyboardInterrupt:
                    reply, interrupted = Reply(self._site, error="site-stopped"), True
            answer = Message(dump_reply(reply), reply_to=message)
            # Flower would count the message's life by this machine's clock, which may be wrong.
            answer.metadata.created_at, answer.metadata.ttl = message.metadata.created_at, message.metadata.ttl
            client.push_messages([answer])
            client.finish("")
            give_back()
            log.info("answered: %s", reply.error or f"{len(reply.body)} bytes")
            if interrupted:
                raise KeyboardInterrupt
        finally:
            over.set()
            if beat.ident is not None:
                beat.join(timeout=1)
            client.close()

    def _receive(self, client: TaskClient, over: threading.Event, stop: threading.Event) -> Message | None:
        """Waits for the task's message. The task exists first; its chunks follow at the speed of the connection."""
        while not over.is_set() and not stop.is_set():
            for message in client.pull_messages([], max_bytes=self._max_bytes):
                return message
            over.wait(self._poll_s)
        return None

    def _reply_to(self, message: Message) -> Reply:
        if message.has_error():
            return self._refused(flower_error(message))
        try:
            request = parse_request(message.content, max_bytes=self._max_bytes)
            message.content.clear()  # nothing but the request holds its bytes, and that no longer than until they are opened
        except FedLoRAError as e:
            return self._refused(e.code)
        if request.site != self._site:
            return Reply(self._site, error="wrong-recipient")
        return self._work(request)

    def _refused(self, code: str) -> Reply:
        if code == Oversized.code:
            log.error(
                "oversized: the server's message has more than %d bytes, the most that policy.max_request_bytes in site.toml "
                "lets in; a task needs four bytes for each value of the adapter at most",
                self._max_bytes,
            )
        return Reply(self._site, error=code)

    def _work(self, request: Request) -> Reply:
        self._working = True
        try:
            reply = self._handle(request)
        except FedLoRAError as e:
            log.error("%s: %s", e.code, e)
            return Reply(self._site, error=e.code)
        except Exception:
            # The text may quote a patient. It stays in this site's log.
            log.exception("internal error")
            return Reply(self._site, error="internal")
        finally:
            self._working = False
        return Reply(self._site, reply.body, reply.error)

    def _beat(self, client: TaskClient, over: threading.Event) -> None:
        while not over.wait(self._heartbeat_s):
            try:
                if not client.heartbeat():
                    log.warning("Flower gave this message up; a finished answer stays in the journal")
                    over.set()
            except ConnectionFailed as e:
                log.warning("no heartbeat: %s", e)
