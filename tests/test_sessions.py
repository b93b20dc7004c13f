"""Visitors see only what is theirs, and what is theirs is freed."""

import time
from dataclasses import dataclass

import pytest

from seguncert.apps.sessions import PHOTOS, Forgotten, Sessions
from seguncert.apps.sight import Sight


@dataclass(frozen=True)
class Sized(Sight):
    size: int = 1

    @property
    def bytes(self):
        return self.size


def photo(token, size=1):
    return Sized("photo", None, 0.0, token, size)


def test_a_photo_is_found_by_its_word_only(tmp_path):
    sessions = Sessions(tmp_path)
    sessions.keep(sessions.of("ann"), photo("her word"))
    assert sessions.sight("her word").token == "her word"
    for wrong in ("", "ann", "another", None, 7, ["her word"]):
        with pytest.raises(Forgotten, match="no longer remembered. Look at it again"):
            sessions.sight(wrong)
    with pytest.raises(Forgotten, match="expected a session hash"):
        sessions.of(None)


def test_the_oldest_go_first(tmp_path):
    sessions = Sessions(tmp_path, memory=10)
    ann, bob = sessions.of("ann"), sessions.of("bob")
    for k in range(5):
        sessions.keep(ann, photo(str(k)))
    assert [each.token for each in ann.sights] == ["3", "4"] and PHOTOS == 2
    bob.used, ann.used = 2.0, 1.0
    sessions.keep(bob, photo("large", 9))
    assert [each.token for each in ann.sights] == ["4"] and bob.sights
    sessions.keep(bob, photo("alone", 99))
    assert [each.token for each in bob.sights] == ["alone"] and not ann.sights


def test_who_leaves_or_sleeps_is_forgotten(tmp_path):
    sessions = Sessions(tmp_path / "place", idle=0.05)
    ann = sessions.of("ann")
    folder, other = sessions.place(ann, "folder"), sessions.place(ann, "labels")
    again = sessions.place(ann, "folder")
    assert not folder.exists() and again.is_dir() and other.is_dir() and again.stat().st_mode & 0o077 == 0
    assert len(again.name) >= 24
    sessions.keep(ann, photo("word"))
    sessions.end("ann")
    assert not again.exists() and not other.exists()
    with pytest.raises(Forgotten):
        sessions.sight("word")
    folder = sessions.place(sessions.of("bob"), "folder")
    time.sleep(0.1)
    sessions.sweep()
    assert not folder.exists()
    sessions.end("nobody")


def test_a_run_keeps_its_session_and_is_stopped_alone(tmp_path):
    sessions = Sessions(tmp_path, idle=0.05)
    ann = sessions.of("ann")
    with sessions.running(ann, "folder") as folder, sessions.running(ann, "photo") as first:
        place = sessions.place(ann, "folder")
        ann.stop("photo")
        ann.stop("labels")
        assert first.is_set() and not folder.is_set()
        with sessions.running(ann, "photo") as second:
            assert not second.is_set()
        time.sleep(0.1)
        sessions.sweep()
        assert place.exists() and not folder.is_set()
        sessions.end("ann")
        assert folder.is_set() and place.exists()
        late = sessions.place(ann, "labels")
    assert not place.exists() and not late.exists()
    with sessions.running(ann, "photo") as after:
        assert after.is_set()
