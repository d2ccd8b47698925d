"""The journal's writer: a thread between the tick, which never waits, and the disk, which may.

`add` is an append to a bounded queue. A full disk costs rows, never a tick: the batch is dropped and counted,
one warning is logged, and writing is tried again with the next batch. When rows arrive faster than the disk
takes them, the newest are dropped and counted.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvpilot.journal.records import Record
from kvpilot.journal.store import JournalStore

QUEUE_ROWS = 10_000
BATCH_ROWS = 500

_log = logging.getLogger(__name__)
_STOP = object()


class JournalWriter:
    """Owns an open store and the thread that writes to it."""

    def __init__(self, store: JournalStore, queue_rows: int = QUEUE_ROWS) -> None:
        self.lost = 0
        """Rows that never reached the file."""
        self._store = store
        self._queue: queue.Queue[object] = queue.Queue(queue_rows)
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    @property
    def path(self) -> Path:
        """The journal's file."""
        return self._store.path

    def start(self) -> None:
        """Begin writing."""
        self._thread.start()

    def add(self, record: Record) -> None:
        """Hand over one row; never waits."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.lost += 1

    def prune(self) -> None:
        """Have the thread drop old rows after what is queued now; never waits."""
        try:
            self._queue.put_nowait(self._store.prune)
        except queue.Full:
            return  # The next retention comes by itself.

    def close(self, within_s: float = 5.0) -> None:
        """Write what is queued, then close the file. After `within_s` the rest is given up."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(_STOP, timeout=within_s)
            self._thread.join(within_s)
        if not self._thread.is_alive():
            self._store.close()

    def _run(self) -> None:
        while True:
            items = [self._queue.get()]
            while len(items) < BATCH_ROWS and not self._queue.empty():
                items.append(self._queue.get_nowait())
            rows = [item for item in items if isinstance(item, Record)]
            if rows:
                self._attempt(partial(self._store.write, rows), len(rows))
            for item in items:
                if callable(item):
                    self._attempt(item, 0)
            if _STOP in items:
                return

    def _attempt(self, write: Callable[[], None], rows: int) -> None:
        try:
            write()
        except Exception as error:  # Whatever it is: the thread must live for the rows that follow.
            self.lost += rows
            if not self._failing:
                self._failing = True
                _log.warning("journal %s: %s; decisions go on and are not recorded", self._store.path, error)
            return
        if self._failing and rows:
            self._failing = False
            _log.warning("journal %s: written again; %d rows were lost", self._store.path, self.lost)
