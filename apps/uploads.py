"""What visitors send: files only, and only those that they uploaded. Nothing is fetched, and nothing decoded by gradio."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from seguncert.apps.place import gr

MOST_FILES = 2000
MOST_BYTES = 2 << 30  # that a zip may unpack to


def photo_input(**settings: Any) -> gr.Image:
    """A picture as its path; gradio's own decoder would clip 16 bits and unpack bombs."""

    def path(payload: Any) -> str | None:
        if payload is None:
            return None
        if payload.path is None or (payload.url or "").startswith("data:"):
            raise gr.Error("photo: expected an uploaded file. Received: something else.", print_exception=False)
        return payload.path

    return _changed(gr.Image(type="filepath", image_mode=None, **settings), path)


def files_input(**settings: Any) -> gr.File:
    """Uploaded files as (name, path)."""

    def paths(payload: Any) -> list[tuple[str, str]]:
        files = [] if payload is None else getattr(payload, "root", [payload])
        return [(each.orig_name or Path(each.path).name, each.path) for each in files]

    return _changed(gr.File(file_count="multiple", **settings), paths)


def _changed(component: gr.components.Component, preprocess: Callable[[Any], Any]) -> Any:
    """The component, reading as `preprocess` does, and refusing addresses, which gradio would fetch.

    Not a subclass: of these, gradio writes a .pyi beside the source.
    """
    move, move_later = component.move_resource_to_block_cache, component.async_move_resource_to_block_cache

    async def later(place: Any) -> Any:
        return await move_later(_file_only(place))

    component.preprocess = preprocess
    component.move_resource_to_block_cache = lambda place: move(_file_only(place))
    component.async_move_resource_to_block_cache = later
    return component


def _file_only(place: Any) -> Any:
    if place is None or ("://" not in str(place) and os.path.isfile(place)):
        return place
    raise gr.Error(
        "file: expected one that was uploaded. Received: an address, which is not fetched, or no file.",
        print_exception=False,
    )


def unpack(files: Iterable[tuple[str, str]], folder: Path) -> int:
    """Put uploaded files into `folder`, zips unpacked; how many there are.

    Raises ValueError for a zip that is damaged, encrypted, leads out of the folder or holds a link, and for more than
    `MOST_FILES` files or `MOST_BYTES` unpacked; what is no zip is only linked and not looked into.
    """
    count = room = 0
    for name, path in files:
        if zipfile.is_zipfile(path):
            more, taken = _unzip(name, Path(path), folder, MOST_BYTES - room)
            count, room = count + more, room + taken
        else:
            try:
                _free(folder / PurePosixPath(name.replace("\\", "/")).name).hardlink_to(path)
            except OSError as error:
                raise ValueError(f"{name[:80]}: cannot be kept here: {error.strerror}") from None
            count += 1
        if count > MOST_FILES:
            raise ValueError(
                f"files: expected at most {MOST_FILES:,} at once. Received more; `seguncert export` takes any number."
            )
    return count


def _unzip(name: str, path: Path, folder: Path, room: int) -> tuple[int, int]:
    """Files and bytes that came out of it, at most `room` of these."""
    count = total = 0
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [each for each in archive.infolist() if not each.is_dir()]
            entries = [each for each in entries if not each.filename.startswith("__MACOSX/")]
            if len(entries) > MOST_FILES:
                raise ValueError(
                    f"{name}: expected at most {MOST_FILES:,} files. Received: {len(entries):,}; `seguncert export` takes any number."
                )
            for entry in entries:
                inside = PurePosixPath(entry.filename.replace("\\", "/"))
                if (
                    not inside.parts
                    or inside.is_absolute()
                    or ".." in inside.parts
                    or ":" in inside.parts[0]
                    or stat.S_ISLNK(entry.external_attr >> 16)
                ):
                    raise ValueError(f"{name}: expected files that stay in their folder. Received: {entry.filename!r}")
                target = _free(folder / inside)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as out:
                    while chunk := source.read(1 << 20):
                        total += len(chunk)  # what comes out counts, whatever the zip says of itself
                        if total > room:
                            raise ValueError(
                                f"{name}: expected at most {MOST_BYTES >> 30} GiB unpacked, all zips together. Received more."
                            )
                        out.write(chunk)
                count += 1
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{name}: cannot be unpacked here: {error.strerror}") from None
        raise ValueError(f"{name}: expected a whole zip without a password. Received: {error}") from None
    return count, total


def _free(path: Path) -> Path:
    """The path, or one with a number where that is taken."""
    number, free = 2, path
    while free.exists():
        free = path.with_name(f"{path.stem} ({number}){path.suffix}")
        number += 1
    return free
