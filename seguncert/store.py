"""What a batch leaves on disk, so that nothing is lost: folders that appear whole, and a ledger of what was done.

    OUT/ledger.jsonl     one line per attempt on an image, written after its files were complete
    OUT/.partial/        one folder per attempt under way; what is left there after a crash names the images it hit

An image is done when the ledger's last line on it says so, its files are there in the recorded sizes, and the input has
not changed since; the mere existence of a file counts for nothing.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LONGEST_LINE = 1 << 20
OURS = {  # names at the top of an output folder
    "run.json", "ledger.jsonl", "images.csv", "report.html", "embeddings.npy", ".partial",
}  # fmt: skip


class StoreError(RuntimeError):
    """The output folder cannot be used or written to; one line: what, expected, received, what to do."""


def write_file(path: Path, *contents: bytes | str | memoryview) -> None:
    """Write a file so that it is seen whole or not at all: a hidden neighbour first, then a rename."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            for content in contents:
                file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def stamp_of(path: Path) -> list[int]:
    """Size and time of change of an input: when they move, it is done again."""
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]
    except OSError:
        return [-1, -1]


def cannot_write(path: Path, error: OSError) -> StoreError:
    """The clear error for a failed write."""
    if error.errno in FULL:
        return StoreError(
            f"no space left to write {path}. Nothing finished is lost: free some space and give the same command again."
        )
    return StoreError(f"cannot write {path}: {error.strerror}. Give another OUT, or the right to write there.")


class Store:
    """An output folder opened by one batch: says what is done, takes what gets done. Methods may be called by threads."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        """Open or create `out`. `settings` must equal those the folder was begun with; they are its run.json."""
        self.out, self.settings = out, settings
        self._lock, self._numbers = threading.Lock(), itertools.count()
        try:
            out.mkdir(parents=True, exist_ok=True)
            strange = sorted(set(os.listdir(out)) - {"ledger.jsonl", ".run.json.part"})
            if strange and not (out / "run.json").exists():
                raise StoreError(
                    f"{out} holds other files ({strange[0]!r}) and no run.json. Give an empty or new folder as OUT."
                )
            self._ledger = open(out / "ledger.jsonl", "ab+", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise cannot_write(out, error) from None
        try:
            _lock_file(self._ledger.fileno(), out)
            self._check_settings(settings)
            self.lines: dict[str, dict[str, Any]] = {}
            self.interrupted = self._collect_interrupted()
        except BaseException:
            self._ledger.close()
            raise

    def done(self, path: str, stamp: list[int]) -> bool:
        """Whether the image at `path`, with this size and time of change, was finished and its files are all there."""
        line = self.lines.get(path)
        if line is None or line["status"] != "ok" or line["input"] != stamp:
            return False
        sizes = line["files"].items()
        return all(_size(self.out / path / name) == size for name, size in sizes)

    def begin(self, path: str) -> Path:
        """Note on disk that work on `path` has begun; returns the attempt's folder."""
        attempt = self.out / ".partial" / f"{os.getpid()}-{next(self._numbers)}"
        try:
            attempt.mkdir(parents=True)
            (attempt / "path").write_bytes(os.fsencode(path))
        except OSError as error:
            raise cannot_write(attempt, error) from None
        return attempt

    def finish(self, attempt: Path, line: dict[str, Any], files: Mapping[str, bytes | Path]) -> None:
        """Bring the attempt's files, contents or files that lie in its folder, to their place by one rename; then write
        its line into the ledger."""
        final, sizes = self.out / line["path"], dict[str, int]()
        try:
            if files:
                folder = attempt / "files"
                folder.mkdir()
                for name, content in files.items():
                    if isinstance(content, Path):
                        os.rename(content, folder / name)
                    else:
                        (folder / name).write_bytes(content)
                sizes = {name: (folder / name).stat().st_size for name in files}
                final.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(final, ignore_errors=True)
                os.rename(folder, final)
            else:
                self._remove_former(line["path"])
            self._append(line | {"files": sizes})
            shutil.rmtree(attempt)
        except OSError as error:
            raise cannot_write(final, error) from None

    def _remove_former(self, path: str) -> None:
        """Take away what an earlier attempt wrote, and only that: below a folder named like an image lie others."""
        for name in (self.lines.get(path) or {}).get("files") or {}:
            (self.out / path / name).unlink(missing_ok=True)
        try:
            (self.out / path).rmdir()
        except OSError:
            pass  # it is not there, or not empty

    def latest(self) -> Iterator[dict[str, Any]]:
        """The last line on each image, read again from the ledger, so that long lines need not stay in memory."""
        last = {line["path"]: number for number, line in enumerate(self._read())}
        return (line for number, line in enumerate(self._read()) if last[line["path"]] == number)

    def close(self) -> None:
        """Leave nothing of the run but its results; the lock goes with the file."""
        shutil.rmtree(self.out / ".partial", ignore_errors=True)
        self._ledger.close()

    def _append(self, line: dict[str, Any]) -> None:
        data = (json.dumps(line, separators=(",", ":")) + "\n").encode()
        with self._lock:
            end = self._ledger.seek(0, os.SEEK_END)
            if self._ledger.write(data) != len(data):  # the disk became full within the line: no half lines
                self._ledger.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._keep(line)

    def _keep(self, line: dict[str, Any]) -> None:
        self.lines[line["path"]] = {key: line.get(key) for key in ("status", "input", "files", "past")}

    def _read(self) -> Iterator[dict[str, Any]]:
        with open(self.out / "ledger.jsonl", "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    found = json.loads(line)
                    found["path"], found["status"]
                    yield found
                except (ValueError, TypeError, KeyError):
                    raise StoreError(
                        f"{self.out}/ledger.jsonl: line {number} is damaged. Remove that line; its image is then done again."
                    ) from None

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self.out / "run.json"
        self._drop_torn_line()
        if not file.exists():
            write_file(file, json.dumps(settings, indent=2) + "\n")
            return
        try:
            before = json.loads(file.read_text())
            keys = before.keys() | settings.keys()
        except (ValueError, AttributeError):
            raise StoreError(f"{file} is damaged. Give another OUT; what is done here stays as it is.") from None
        then, now = (
            {key: json.dumps(each.get(key)) for key in keys} for each in (before, settings)
        )  # the order counts
        differing = [
            f"{key}: {then[key][:80]} then, {now[key][:80]} now" for key in sorted(keys) if then[key] != now[key]
        ]
        if differing:
            raise StoreError(
                f"{self.out} was begun with other settings ({'; '.join(differing)}). Give the same ones to go on, or another OUT."
            )

    def _drop_torn_line(self) -> None:
        """A crash in the middle of a write leaves a line without an end; its image counts as not done."""
        size = self._ledger.seek(0, os.SEEK_END)
        start = max(0, size - LONGEST_LINE)
        self._ledger.seek(start)
        tail = self._ledger.read()
        if not tail.endswith(b"\n"):
            self._ledger.truncate(start + tail.rfind(b"\n") + 1)

    def _collect_interrupted(self) -> dict[str, int]:
        """Add a line for each attempt that a crash left over; how often each image was hit since its last end."""
        partial = self.out / ".partial"
        for attempt in sorted(partial.iterdir()) if partial.exists() else []:
            path = os.fsdecode((attempt / "path").read_bytes()) if (attempt / "path").exists() else ""
            for each in attempt.iterdir():  # what was not finished may be what fills the disk; the name goes last
                if each.name != "path":
                    shutil.rmtree(each) if each.is_dir() else each.unlink()
            if path:
                self._append({"path": path, "status": "interrupted"})
            shutil.rmtree(attempt)
        hits: dict[str, int] = {}
        for line in self._read():
            self._keep(line)
            hits[line["path"]] = hits.get(line["path"], 0) + 1 if line["status"] == "interrupted" else 0
        return {path: count for path, count in hits.items() if count}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _lock_file(descriptor: int, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(f"{out} is being written by another run. Wait for it, or give another OUT.") from None
    except OSError:  # a file system without locks
        pass
