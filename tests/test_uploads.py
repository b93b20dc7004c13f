"""Uploaded files go where they belong, and zips cannot do harm."""

import io
import stat
import zipfile

import pytest

from seguncert.apps import uploads
from seguncert.apps.uploads import unpack


def packed(path, entries, **how):
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return str(path)


def test_files_and_zips_come_together(tmp_path):
    one, folder = tmp_path / "upload-1", tmp_path / "out"
    one.write_bytes(b"one")
    folder.mkdir()
    archive = packed(tmp_path / "z", [("drive a/é.png", b"two"), ("drive a/", b""), ("__MACOSX/._x", b"no")])
    assert unpack([("my photo.png", str(one)), ("my photo.png", str(one)), ("all.zip", archive)], folder) == 3
    found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert found == {"my photo.png": b"one", "my photo (2).png": b"one", "drive a/é.png": b"two"}


@pytest.mark.parametrize("name", ["../../evil", "..\\evil", "C:\\evil", "a/b.png"])
def test_names_cannot_lead_out(tmp_path, name):
    (tmp_path / "up").write_bytes(b"x")
    folder = tmp_path / "in" / "out"
    folder.mkdir(parents=True)
    unpack([(name, str(tmp_path / "up"))], folder)
    assert [file.parent for file in tmp_path.rglob("*") if file.is_file() and file.name != "up"] == [folder]


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "entry, words",
    [("../evil.png", "stay in their folder"), ("/etc/evil", "stay in their folder"), ("a\\..\\..\\evil", "stay in their folder"),
     ("C:/evil", "stay in their folder"), (link("link.png"), "stay in their folder")],
)  # fmt: skip
def test_zips_that_lead_out_are_refused(tmp_path, entry, words):
    folder = tmp_path / "in"
    folder.mkdir()
    archive = packed(tmp_path / "z", [(entry, b"/etc/passwd")])
    with pytest.raises(ValueError, match=words) as error:
        unpack([("z.zip", archive)], folder)
    assert "\n" not in str(error.value) and not list(folder.rglob("*"))


def test_bombs_and_crowds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(uploads, "MOST_FILES", 3)
    (tmp_path / "in").mkdir()
    bomb = packed(tmp_path / "bomb", [("zeros.png", bytes(2 << 20))], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="bomb.zip: expected at most 0 GiB unpacked, all zips together. Received more"):
        unpack([("bomb.zip", bomb)], tmp_path / "in")
    half = packed(tmp_path / "half", [("zeros.png", bytes(600 << 10))])
    with pytest.raises(ValueError, match="two.zip: expected at most"):
        unpack([("one.zip", half), ("two.zip", half)], tmp_path / "in")
    crowd = packed(tmp_path / "crowd", [(f"{k}.png", b"") for k in range(4)])
    with pytest.raises(ValueError, match="expected at most 3 files. Received: 4"):
        unpack([("crowd.zip", crowd)], tmp_path / "in")
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(ValueError, match="expected at most 3 at once"):
        unpack([("x.png", str(tmp_path / "x"))] * 4, tmp_path / "in")


def test_damaged_zips_are_one_line(tmp_path):
    (tmp_path / "in").mkdir()
    good = io.BytesIO()
    with zipfile.ZipFile(good, "w") as archive:
        archive.writestr("a.png", b"abc" * 1000)
    broken = bytearray(good.getvalue())
    broken[60:90] = b"x" * 30
    (tmp_path / "z").write_bytes(broken)
    with pytest.raises(ValueError, match="z.zip: expected a whole zip without a password"):
        unpack([("z.zip", str(tmp_path / "z"))], tmp_path / "in")


def test_names_that_no_disk_takes_are_one_line(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be kept here: File name too long") as error:
        unpack([("x" * 300 + ".png", str(tmp_path / "x"))], tmp_path)
    assert str(tmp_path) not in str(error.value)
