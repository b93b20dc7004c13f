"""Nothing finished is lost, nothing unfinished is taken for finished."""

import json
import os
import subprocess
import sys

import pytest

from seguncert.store import Store, StoreError, write_file

SETTINGS = {"model": "m", "maps": {"entropy": {}}}
STAMP = [10, 20]


def finish(store, path, content=b"data"):
    line = {"path": path, "status": "ok", "input": STAMP}
    store.finish(store.begin(path), line, {"labels.png": content, "overlay.jpg": b"x"})


def test_done_survives_reopening(tmp_path):
    store = Store(tmp_path / "out", SETTINGS)
    finish(store, "sub/a.png")
    assert store.done("sub/a.png", STAMP)
    store.close()
    store = Store(tmp_path / "out", SETTINGS)
    assert store.done("sub/a.png", STAMP) and not store.done("b.png", STAMP)
    assert sorted(os.listdir(tmp_path / "out" / "sub" / "a.png")) == ["labels.png", "overlay.jpg"]
    store.close()


@pytest.mark.parametrize("spoil", ["input changed", "file removed", "file cut", "only files, no line"])
def test_not_done_when(tmp_path, spoil):
    store = Store(tmp_path, SETTINGS)
    finish(store, "a.png")
    store.close()
    if spoil == "file removed":
        (tmp_path / "a.png" / "labels.png").unlink()
    elif spoil == "file cut":
        (tmp_path / "a.png" / "labels.png").write_bytes(b"da")
    elif spoil == "only files, no line":
        (tmp_path / "ledger.jsonl").write_bytes(b"")
    store = Store(tmp_path, SETTINGS)
    assert not store.done("a.png", [10, 21] if spoil == "input changed" else STAMP)
    finish(store, "a.png", b"again")
    assert (tmp_path / "a.png" / "labels.png").read_bytes() == b"again"
    store.close()


def test_a_torn_last_line_is_dropped_and_an_inner_one_is_named(tmp_path):
    store = Store(tmp_path, SETTINGS)
    finish(store, "a.png")
    finish(store, "b.png")
    store.close()
    ledger = (tmp_path / "ledger.jsonl").read_bytes()
    for cut in range(1, len(ledger.splitlines(keepends=True)[1])):
        (tmp_path / "ledger.jsonl").write_bytes(ledger[:-cut])
        store = Store(tmp_path, SETTINGS)
        assert store.done("a.png", STAMP) and not store.done("b.png", STAMP)
        store.close()
    (tmp_path / "ledger.jsonl").write_bytes(b"{}}\n" + ledger)
    with pytest.raises(StoreError, match="line 1 is damaged. Remove that line"):
        Store(tmp_path, SETTINGS)


def test_a_failure_after_a_success_takes_the_old_files_away(tmp_path):
    store = Store(tmp_path, SETTINGS)
    finish(store, "a.png")
    store.finish(store.begin("a.png"), {"path": "a.png", "status": "failed", "input": STAMP, "error": "e"}, {})
    assert not store.done("a.png", STAMP) and not (tmp_path / "a.png").exists()
    store.close()


def test_attempts_that_a_crash_left_are_counted(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.png")
    for expected in ({}, {name: 1}, {name: 2}):
        store = Store(tmp_path, SETTINGS)
        assert store.interrupted == expected
        store.begin(name)
        store._ledger.close()  # as a crash would
    store = Store(tmp_path, SETTINGS)
    assert store.interrupted == {name: 3}
    finish(store, name)
    store.close()
    assert not (tmp_path / ".partial").exists()
    store = Store(tmp_path, SETTINGS)
    assert store.interrupted == {} and store.done(name, STAMP)
    store.close()


def test_other_settings_are_refused_and_named(tmp_path):
    Store(tmp_path, SETTINGS).close()
    with pytest.raises(StoreError, match='begun with other settings .model: "m" then, "n" now.. Give the same ones'):
        Store(tmp_path, SETTINGS | {"model": "n"})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="holds other files .'thesis.tex'. and no run.json"):
        Store(tmp_path, SETTINGS)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_two_runs_at_once_are_refused(tmp_path):
    store = Store(tmp_path, SETTINGS)
    code = f"from pathlib import Path; from seguncert.store import Store; Store(Path({str(tmp_path)!r}), {SETTINGS!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is being written by another run" in other.stderr
    store.close()


def test_a_full_disk_is_one_clear_error(tmp_path):
    """The kernel refuses files over a limit like a full disk refuses them: the write fails half way."""
    code = f"""
import resource, signal
from pathlib import Path
from seguncert.store import Store, StoreError
store = Store(Path({str(tmp_path)!r}), {SETTINGS!r})
line = {{"path": "a.png", "status": "ok", "input": [1, 1]}}
store.finish(store.begin("a.png"), line, {{"labels.png": b"x"}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    store.finish(store.begin("b.png"), line | {{"path": "b.png"}}, {{"labels.png": bytes(5000)}})
except StoreError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "no space left to write" in output and "give the same command again" in output
    store = Store(tmp_path, SETTINGS)
    assert store.done("a.png", [1, 1]) and not store.done("b.png", [1, 1])
    assert not (tmp_path / "b.png").exists()
    store.close()


def test_a_disk_that_is_full_within_a_line_of_the_ledger_leaves_no_half_line(tmp_path):
    code = f"""
import resource
from pathlib import Path
from seguncert.store import Store, StoreError
store = Store(Path({str(tmp_path)!r}), {SETTINGS!r})
line = {{"status": "ok", "input": [1, 1], "long": "x" * 300}}
for k in range(20):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        store.finish(store.begin(str(k)), line | {{"path": str(k)}}, {{"labels.png": b"x"}})
    except StoreError as error:
        print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        store.finish(store.begin("after"), line | {{"path": "after"}}, {{"labels.png": b"x"}})
        break
store.close()
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.count("no space left to write") == 1
    store = Store(tmp_path, SETTINGS)
    assert [line["path"] for line in store.latest()] == ["0", "1", "after"]
    store.close()


def test_write_file_leaves_the_old_one_when_it_fails(tmp_path):
    target = tmp_path / "images.csv"
    write_file(target, "old")
    (tmp_path / ".images.csv.part").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        write_file(target, "new")
    assert target.read_text() == "old"


def test_the_last_line_on_each_image_counts(tmp_path):
    store = Store(tmp_path, SETTINGS)
    finish(store, "a.png", b"1")
    finish(store, "b.png", b"2")
    finish(store, "a.png", b"333")
    assert {line["path"]: line["files"]["labels.png"] for line in store.latest()} == {"a.png": 3, "b.png": 1}
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS
    store.close()
