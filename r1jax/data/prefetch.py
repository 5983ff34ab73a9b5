"""A thread that brings what will be read, and ends with the store that it works for."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from r1jax.errors import IN_CLIENTS

WAITING = 64
"""Most requests that wait; more would be read too late anyway."""
END_S = 5.0
"""Longest that the end of the program waits for a read under way."""


class Prefetcher:
    """Hands requests to a method of an object that it does not keep alive."""

    def __init__(self, owner: Any, bring: Callable[[Any, bytes], None]) -> None:
        """Prepares; the thread starts with the first request.

        Args:
          owner: What reads; its end is the end of the thread.
          bring: Function of the owner and of what was asked for.
        """
        self._owner = weakref.ref(owner)
        self._bring = bring
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._pending = 0
        self._ended = False
        self._thread: threading.Thread | None = None
        weakref.finalize(owner, Prefetcher.stop, self)  # when it is collected, and at the end of the program

    def ask(self, request: bytes) -> bool:
        """Takes a request without waiting.

        Args:
          request: Its name, which `bring` understands.

        Returns:
          False if too many wait: it is left to the reader then.
        """
        with self._idle:
            if self._pending >= WAITING or self._ended:
                return False
            self._pending += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="r1jax-prefetch", daemon=True)
                self._thread.start()
        self._requests.put(request)
        return True

    def drain(self) -> None:
        """Waits until all requests are done."""
        with self._idle:
            self._idle.wait_for(lambda: not self._pending or self._ended)

    def stop(self) -> None:
        """Ends the thread after the request that it works on."""
        self._ended = True
        self._requests.put(None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(END_S)
            if thread.is_alive():
                IN_CLIENTS.add(thread)

    def _run(self) -> None:
        while True:
            request = self._requests.get()
            owner = self._owner()
            if request is None or owner is None or self._ended:
                return self._leave()
            try:
                self._bring(owner, request)
            except Exception:  # noqa: BLE001, S110
                pass  # the cold store fails: the reader who comes for these rows meets the error itself
            finally:
                del owner
                with self._idle:
                    self._pending -= 1
                    self._idle.notify_all()

    def _leave(self) -> None:
        with self._idle:
            self._ended = True
            self._idle.notify_all()
