"""What is written of a tally: figures that JSON can hold, rows, and a page that needs nothing beside it."""

import csv
import io
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from seguncert.clusters import find_clusters
from seguncert.corruptions import CORRUPTIONS
from seguncert.findings import FILES, check_out, shift_summary, write_findings
from seguncert.shift import CLEAN, SHOWN, Shift, Shifted, Sums, conditions
from seguncert.store import StoreError
from seguncert.tally import Judged, Part, Tally

CLASSES = ("sky", "<road>", "pole")
RUN = {
    "seguncert": "0.1.0", "input": "photos", "labels": "truth", "ignore_index": 255, "boundary": 3, "replicates": 30, "seed": 0,
    "protocol": None, "method": "none", "calibration": "none", "maps": {"confidence": {}, "entropy": {}}, "format": "png16",
    "model": {"name": "street & co", "sha256": "ab" * 32, "classes": list(CLASSES), "colours": [[1, 2, 3]] * 3, "frame": None, "dropout": []},
}  # fmt: skip
PICTURES = dict.fromkeys(("photo", "classes", "errors", "confidence"), b"JPEG")


def tally_of(paths, calibrated=False, sharpness=3.0, spoil=None, names=()):
    shift = Shift(tuple(names), frozenset(paths[::2]), len(paths), 3, 1 + calibrated, 30, 0)
    tally = Tally.empty(
        CLASSES, ("confidence", "entropy"), find_clusters(paths), calibrated=calibrated, published=False, replicates=30, seed=0,
        shift=shift if names else None,
    )  # fmt: skip
    for k, path in enumerate(paths):
        generator = torch.Generator().manual_seed(k)
        logits = sharpness * torch.randn(3, 20, 30, generator=generator)
        labels = np.where(np.random.default_rng(k).random((20, 30)) < 0.6, logits.argmax(0).numpy(), 0)
        if spoil:
            logits = spoil(logits)
        parts = []
        for stage, factor in zip(tally.stages, (0.5, 1.0) if calibrated else (1.0,), strict=True):
            scores = stage.evaluation.begin()
            p = (factor * logits).softmax(0)
            entropy = -(p * p.clamp(min=1e-9).log()).sum(0) / math.log(3)
            scores.update(factor * logits, labels, {"entropy": entropy.clamp(0, 1)}, np.arange(30) % 4 == labels * 0)
            parts.append(Part(scores))
        row = {"path": path, "status": "ok", "error": "", "note": "", "height": 20, "width": 30}
        sums = tuple(Sums.of(part.scores.scores) for part in parts)
        shifted = Shifted(dict.fromkeys(conditions(names), sums), dict.fromkeys(shift.sums, b"JPEG"))
        tally.add(Judged(row, tuple(parts), PICTURES, shifted if names and path in shift.photos else None))
    return tally


class Reader(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_page_is_whole_and_shows_figures_with_intervals(tmp_path, calibrated):
    paths = [f"{drive}_{k}.png" for drive in "abcdef" for k in range(2)]
    metrics = write_findings(tally_of(paths, calibrated), RUN, tmp_path)
    page = Reader((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 7 and "script" not in page.tags and "link" not in page.tags
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    loaded = [value for name, value in page.attributes if name in ("src", "href") and not value.startswith("#")]
    assert all(value.startswith("data:image/") for value in loaded)
    assert f"{100 * metrics['ece']:.2f} %" in page.text and f"{metrics['nll']:.3f} nat" in page.text
    assert (
        "6 clusters, a sequence each" in " ".join(page.text.split())
        and "take the intervals for too narrow" in page.text
    )
    assert ("Before" in page.text) == calibrated and ("Not calibrated" in page.text) != calibrated
    for words in (
        "Top-label calibration asks",
        "Class-wise calibration asks",
        "over-confident by",
        "street & co",
        "<road>",
    ):
        assert words in page.text


def test_names_in_metrics_json_are_those_of_the_contract(tmp_path):
    write_findings(tally_of([f"{k}x.png" for k in range(12)], calibrated=True), RUN, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    names = ("miou", "accuracy", "nll", "brier", "ece", "ece_classwise", "ece_image_mean", "ece_boundary", "ece_interior",
             "ece_l2_debiased", "iou.<road>", *(f"{figure}.{name}" for figure in ("error_auroc", "error_ap", "error_fpr95", "aurc", "e_aurc") for name in ("confidence", "entropy")))  # fmt: skip
    for source in (metrics, metrics["before"]):
        for name in names:
            low, high = source[f"{name}_interval"]
            assert low <= high and isinstance(source[name], float), name
        assert isinstance(source["ece_equal_mass"], float)
    assert metrics["change"]["nll"] == pytest.approx(metrics["nll"] - metrics["before"]["nll"])
    protocol = metrics["protocol"]
    assert (protocol["images"], protocol["ignore_index"], protocol["boundary"], protocol["method"]) == (
        12,
        255,
        3,
        "none",
    )
    assert protocol["intervals"]["number"] == 12 and "15 of equal width" in protocol["bins"]


def test_what_is_infinite_or_undefined_is_null_and_said(tmp_path):
    def certain(logits):
        return torch.where(logits == logits.amax(0), logits, -torch.inf)

    metrics = write_findings(tally_of(["a.png", "b.png"], spoil=certain), RUN, tmp_path)
    assert metrics["nll"] is None and metrics["nll_infinite_pixels"] > 0
    assert "had probability 0 for their true class" in (tmp_path / "report.html").read_text()


def test_rows_of_any_name_come_back(tmp_path):
    paths = ["a,b.png", 'quo"te.png', "new\nline.png", "bare\rreturn.png", "caf\udce9.png", "</td><script>.png"]
    tally = tally_of(paths)
    tally.add(
        Judged({"path": "z.png", "status": "failed", "error": "no label"})
    ) if "z.png" in tally.clusters.of else None
    write_findings(tally, RUN, tmp_path)
    text = (tmp_path / "metrics.csv").read_bytes().decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["path"] for row in rows] == sorted(paths)
    assert all(
        abs(float(row["confidence"]) - float(row["accuracy"]) - float(row["overconfidence"])) < 2e-6 for row in rows
    )
    assert "<script>" not in (tmp_path / "report.html").read_bytes().decode()


def test_only_the_ten_worst_are_shown_worst_first(tmp_path):
    tally = tally_of([f"{k}x.png" for k in range(13)], sharpness=9.0)
    over = sorted((row["overconfidence"] for row in tally.rows.values()), reverse=True)
    assert [row["overconfidence"] for row in tally.worst.rows] == over[:10]
    write_findings(tally, RUN, tmp_path)
    assert (tmp_path / "report.html").read_text().count('class="worst"') == 10
    assert not tally.worst.wants(over[10]) and tally.worst.wants(over[9]) and not tally.worst.wants(math.nan)


def test_an_output_folder_is_new_or_of_an_earlier_evaluation(tmp_path):
    check_out(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    for name in FILES:
        (tmp_path / name).touch()
    with pytest.raises(StoreError, match="holds other files .'new'.. Give an empty or new folder as OUT."):
        check_out(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write .*file"):
        check_out(tmp_path / "file")


def test_the_same_tally_gives_the_same_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_findings(tally_of(["a.png", "b.png"], calibrated=True), RUN, tmp_path / name)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("calibrated", [False, True])
def test_photos_made_worse_have_a_section_of_their_own(tmp_path, calibrated):
    paths = [f"{drive}_{k}.png" for drive in "abcdef" for k in range(2)]
    metrics = write_findings(tally_of(paths, calibrated, names=["fog", "jpeg"]), RUN, tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())["corruptions"]
    assert found == metrics["corruptions"] and {*found} == {"about", *conditions(["fog", "jpeg"])}
    about = found["about"]
    assert (about["images"], about["clusters"], about["chosen"]) == (6, 6, "6 evenly spaced of 12 with a label")
    assert about["levels"]["fog"]["of_severity"] == [[*each] for each in CORRUPTIONS["fog"].levels]
    for name in ("miou", "accuracy", "nll", "ece", "confidence"):
        low, high = found["fog.3"][f"{name}_interval"]
        assert low <= found["fog.3"][name] <= high
        assert ("change" in found["fog.3"]) == calibrated and (
            not calibrated or f"{name}_interval" in found["jpeg.1"]["change"]
        )
    page = Reader((tmp_path / "report.html").read_text())
    text = " ".join(page.text.split())
    assert page.tags.count("svg") == 8 and "promises nothing on these" in text
    assert (
        f"The same 6 photos (6 evenly spaced of 12 with a label) at every point, {about['pixels']:,} labelled pixels in 6 clusters"
        in text
    )
    pictures = [value for name, value in page.attributes if name == "alt" and "severity" in value]
    assert len(pictures) == 2 * len(SHOWN) and "The middle of a_0.png" in text
    header, rows = shift_summary(metrics)
    assert header[0] == "severity 3" and [row[0] for row in rows] == ["Clean", "Fog", "JPEG"]
    assert all(len(row) == len(header) == (8 if calibrated else 6) for row in rows)
    assert rows[1][header.index("ECE")] == f"{100 * found['fog.3']['ece']:.2f} %"


def test_that_no_photo_could_be_made_worse_is_said(tmp_path):
    tally = tally_of(["a.png", "b.png"])
    tally.shift = Shift(("fog",), frozenset(["c.png"]), 3, 3, 1, 30, 0)
    metrics = write_findings(tally, RUN, tmp_path)
    assert metrics["corruptions"][CLEAN]["ece"] is None and metrics["corruptions"]["about"]["images"] == 0
    assert "None of the photos that were to be made worse could be judged" in (tmp_path / "report.html").read_text()
    assert shift_summary(metrics)[1][0][1] == "–" and shift_summary({}) == ([], [])
