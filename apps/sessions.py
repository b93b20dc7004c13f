"""What the page remembers for each visitor: photos looked at, a folder, the wish to stop. Nothing is shared, all is freed.

A session is known by the secret that the browser made for it; a photo by a word that only its session was told. What was
not used for an hour goes, and the oldest photo goes first where all together they hold too much memory.
"""

from __future__ import annotations

import shutil
import threading
import time
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
    """One visitor."""

    sights: list[Sight] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    folder: Path | None = None
    used: float = 0.0


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

    def place(self, session: Session) -> Path:
        """An empty folder of the session; the one before is removed."""
        with self._lock:
            self._clear(session)
            folder = self.root / f"folder-{threading.get_ident()}-{time.monotonic_ns()}"
            folder.mkdir(parents=True, mode=0o700)
            session.folder = folder
            return folder

    def end(self, secret: str | None) -> None:
        """Forget a visitor, who left."""
        with self._lock:
            session = self._all.pop(secret or "", None)
            if session is not None:
                session.stop.set()
                self._clear(session)

    def sweep(self) -> None:
        """Forget those who were not seen for long."""
        with self._lock:
            now = time.monotonic()
            for secret in [secret for secret, each in self._all.items() if now - each.used > self.idle]:
                self.end(secret)

    def _clear(self, session: Session) -> None:
        if session.folder is not None:
            shutil.rmtree(session.folder, ignore_errors=True)
            session.folder = None
