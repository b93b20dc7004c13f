"""What the page remembers for each visitor: photos looked at, folders, the wish to stop. Nothing is shared, all is freed.

A session is known by the secret that the browser made for it; a photo by a word that only its session was told. What was
not used for an hour goes, and the oldest photo goes first where all together they hold too much memory.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from seguncert.apps.sight import Sight

IDLE = 3600.0  # seconds
PHOTOS = 2  # of one session
MEMORY = 3 << 30  # bytes of all photos


class Forgotten(ValueError):
    """What is asked for is gone, or never was of this session."""


@dataclass
class Session:
    """One visitor. Runs are known by their kind: of a photo, of a folder, of labels."""

    sights: list[Sight] = field(default_factory=list)
    stops: dict[str, threading.Event] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    runs: int = 0  # under way
    used: float = 0.0
    ended: bool = False

    def stop(self, kind: str) -> None:
        """Ask the run of that kind that is under way, if there is one, to stop."""
        if kind in self.stops:
            self.stops[kind].set()


class Sessions:
    """All visitors; safe to use from threads."""

    def __init__(self, root: Path, idle: float = IDLE, memory: int = MEMORY):
        self.root, self.idle, self.memory = root, idle, memory
        self._all: dict[str, Session] = {}
        self._lock = threading.RLock()

    def of(self, secret: str | None) -> Session:
        """That of a visitor, begun if new. Raises Forgotten for one without a secret."""
        if not secret:
            raise Forgotten("session: expected a session hash, as browsers and gradio_client send. Received none.")
        with self._lock:
            self.sweep()
            session = self._all.setdefault(secret, Session())
            session.used = time.monotonic()
            return session

    @contextmanager
    def running(self, session: Session, kind: str) -> Iterator[threading.Event]:
        """While it lasts the session does not end; the event is set when this run is to stop."""
        stop = threading.Event()
        with self._lock:
            session.stops[kind] = stop
            session.runs += 1
            if session.ended:
                stop.set()
        try:
            yield stop
        finally:
            with self._lock:
                session.runs -= 1
                session.used = time.monotonic()
                if session.stops.get(kind) is stop:
                    del session.stops[kind]
                if session.ended and not session.runs:
                    self._clear(session)

    def keep(self, session: Session, sight: Sight) -> None:
        """Remember a photo; the session's oldest goes, and others' where the memory is full."""
        with self._lock:
            session.sights = [*session.sights, sight][-PHOTOS:]
            while sum(each.bytes for one in self._all.values() for each in one.sights) > self.memory:
                others = [one for one in self._all.values() if one.sights and one.sights != [sight]]
                if not others:
                    break
                min(others, key=lambda one: one.used).sights.pop(0)

    def sight(self, token: object) -> Sight:
        """The photo of a token. Raises Forgotten."""
        with self._lock:
            for session in self._all.values():
                for sight in session.sights:
                    if isinstance(token, str) and sight.token == token:
                        session.used = time.monotonic()
                        return sight
        raise Forgotten("This photo is no longer remembered. Look at it again.")

    def place(self, session: Session, kind: str) -> Path:
        """An empty folder for runs of that kind; the one before is removed. Its name cannot be guessed."""
        with self._lock:
            if kind in session.folders:
                shutil.rmtree(session.folders.pop(kind), ignore_errors=True)
            folder = self.root / secrets.token_urlsafe(24)
            folder.mkdir(parents=True, mode=0o700)
            session.folders[kind] = folder
            return folder

    def end(self, secret: str | None) -> None:
        """Forget a visitor, who left; what still runs is asked to stop, and cleared when it has."""
        with self._lock:
            session = self._all.pop(secret or "", None)
            if session is None:
                return
            session.ended, session.sights = True, []
            for stop in session.stops.values():
                stop.set()
            if not session.runs:
                self._clear(session)

    def sweep(self) -> None:
        """Forget those who were not seen for long, and for whom nothing runs."""
        with self._lock:
            now = time.monotonic()
            for secret in [key for key, each in self._all.items() if now - each.used > self.idle and not each.runs]:
                self.end(secret)

    def _clear(self, session: Session) -> None:
        for folder in session.folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        session.folders = {}
