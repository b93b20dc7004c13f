"""Files of conformal sets: there and back, damaged ones, and what is refused or passed over."""

import json
import math
from dataclasses import replace

import pytest

from seguncert.calibration import Calibration
from seguncert.calibrators import Scaling
from seguncert.conformal import Aim, ConformalSets
from seguncert.sets import FittedSets, find_sets, known_by, load_sets

MODEL = {"name": "small", "sha256": "ab" * 32, "classes": ["a", "b", "c"]}
SAMPLING = {"method": "none", "scale": "auto"}
SOFTER = Calibration(Scaling("temperature", -0.5), MODEL, SAMPLING, {"pictures": 9})
SETS = ConformalSets(Aim(3, by_class=True), 0.1, (4.0, math.inf, 0.3), (9, 3, 12))
FITTED = FittedSets(SETS, MODEL, SAMPLING, known_by(SOFTER), {"images": 12}, {"size_mean": 1.5})


def found(choice, folder=None, model=MODEL, sampling=SAMPLING, calibration=SOFTER, asked=True, overridden=False):
    return find_sets(choice, folder, model, sampling, calibration, asked=asked, overridden=overridden)


@pytest.fixture
def file(tmp_path):
    FITTED.save(tmp_path / "conformal-none.json")
    return tmp_path / "conformal-none.json"


def test_there_and_back(file, tmp_path):
    assert load_sets(file) == FITTED == found(file) == found("auto", tmp_path) == found(FITTED)
    load_sets(file).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_a_calibration_is_known_by_what_it_does():
    nothing = Calibration(None, MODEL, SAMPLING, {"pictures": 9})
    assert found(replace(FITTED, calibration=known_by(None)), calibration=nothing)
    renamed = replace(SOFTER, protocol={"pictures": 10}, measured={"nll": 0.1})
    assert found(FITTED, calibration=renamed) == FITTED
    refitted = replace(SOFTER, calibrator=Scaling("temperature", -0.5000001))
    assert refitted.about == SOFTER.about
    with pytest.raises(ValueError, match="conformal: expected one that was fitted after the calibration in use, temperature, fitted on 9 pictures .sha256 .*Received: one fitted after temperature, fitted on 9 pictures .sha256 .*Set that calibration, or fit sets"):  # fmt: skip
        found(FITTED, calibration=refitted)


OTHERS = {
    "model": ({"model": MODEL | {"name": "part", "sha256": "cd" * 32}}, "expected one that was fitted for part .sha256 cdcdcdcdcdcd….. Received: one for small .abababababab….. Fit sets with `seguncert conformal`, or set conformal none."),
    "scale": ({"sampling": SAMPLING | {"scale": "native"}}, "expected one that was fitted with scale native. Received: one fitted with scale auto."),
    "calibration": ({"calibration": None}, "expected one that was fitted after the calibration in use, none. Received: one fitted after temperature"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_what_they_were_not_fitted_for_is_refused(file, tmp_path, what):
    other, text = OTHERS[what]
    for choice in (str(file), FITTED, "auto"):
        with pytest.raises(ValueError, match=text):
            found(choice, tmp_path, **other, overridden=what == "calibration")
    with pytest.raises(ValueError, match=f"conformal-none.json: {text}"):
        found(file, **other, asked=False, overridden=True)


def test_auto_is_passed_over_only_where_the_user_set_something_else(file, tmp_path):
    for what, overridden in (("scale", False), ("calibration", True), ("model", True)):
        assert found("auto", tmp_path, **OTHERS[what][0], asked=False, overridden=overridden) is None
    for what in ("model", "calibration"):  # as when the model or the calibration beside it was made anew
        with pytest.raises(ValueError, match=OTHERS[what][1]):
            found("auto", tmp_path, **OTHERS[what][0], asked=False)


def test_a_file_under_the_name_of_another_method_is_refused(file, tmp_path):
    file.rename(tmp_path / "conformal-tta.json")
    with pytest.raises(ValueError, match="conformal-tta.json: expected one that was fitted with method tta. Received: one fitted with method none"):  # fmt: skip
        found("auto", tmp_path, sampling=SAMPLING | {"method": "tta"})


def test_none_are_needed_or_made_by_a_command(tmp_path):
    for folder in (None, tmp_path):
        assert found("auto", folder, asked=False) is None
        with pytest.raises(ValueError, match="maps: set_size is of conformal sets: expected conformal-none.json in the folder of small, .* Received: none. Fit sets with `seguncert conformal`."):  # fmt: skip
            found("auto", folder)
    assert found("none", tmp_path, asked=False) is None and found(None, asked=False) is None


def change(content, path, value):
    *path, last = path.split(".")
    for each in path:
        content = content[each]
    content[last] = value


@pytest.mark.parametrize(
    "path, value",
    [
        ("seguncert_conformal", 2),
        ("sets", {}),
        ("sets.odds", [1.0]),
        ("sets.odds", [math.nan, 1.0, 1.0]),
        ("sets.alpha", "a"),
        ("sets.kind", "raps"),
        ("model.classes", ["a", "b"]),
        ("model.sha256", None),
        ("sampling", "none"),
        ("calibration.sha256", 5),
        ("calibration", None),
    ],
)
def test_damaged_files_are_named(file, path, value):
    content = json.loads(file.read_text())
    change(content, path, value)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="conformal-none.json: expected a file that `seguncert conformal` of this version wrote. Received: "):  # fmt: skip
        load_sets(file)


def test_files_that_are_no_sets(file, tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: expected a file of conformal sets. Received: No such file"):
        load_sets("nowhere.json")
    for content in (b"", b"[]", b"\xff\xfe", file.read_bytes()[:200]):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(
            ValueError, match="x.json: expected a file that `seguncert conformal` of this version wrote"
        ):
            load_sets(tmp_path / "x.json")
    mask = ConformalSets(Aim(3, "foreground", foreground=(1,)), 0.1, (1.0,), (9,))
    replace(FITTED, sets=mask).save(file)
    with pytest.raises(ValueError, match="Received: ValueError: Aim.*foreground"):
        load_sets(file)
