"""Hand-over files, read back by plain loops from the descriptions of the formats, and by the tools' own readers."""

import csv
import json
import os
import resource
import subprocess
import weakref
import zipfile
from pathlib import Path
from urllib.parse import unquote_to_bytes
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_rle import decode_brush, decode_coco, decode_counts

from seguncert.annotation import FORMATS, Item, Region, hand_over
from seguncert.labels import read_label
from seguncert.store import StoreError

READERS = os.environ.get("SEGUNCERT_READERS")
FILES = ["coco.json", "cvat-labels.json", "cvat-masks.zip", "cvat.xml", "label-studio.json", "label-studio.xml", "png"]
TRICKY = ["background", "Straße & <road>", "a \"quoted\" 'name'", "人 ", "$reason", "no label"]


def random_labels(height, width, C, seed):
    """Random classes with holes, of which no two images have the same."""
    return np.random.default_rng(seed).choice([*range(C), 255], (height, width)).astype(np.uint8)


def tricky():
    """Names, sizes and regions that break careless writers; class 5 is in no image; colours collide, or are black."""
    some = np.array([[1, 0, 1], [0, 1, 0]], bool)
    full = np.full((9, 9), 3, np.uint8)
    items = [
        Item("a.jpg", 5, 7, random_labels(7, 5, 5, 0), 1, 0.7, "whole image"),
        Item("sub dir/é & <b> \"q\" 'x' #1 100% + ?.jpeg", 9, 6, random_labels(6, 9, 5, 1), 2, 0.1 + 0.2, "its first region", (
            Region(2, (5, 3, 4, 3), None, 0.1 + 0.2, "corner of the image"),
            Region(3, (0, 0, 1, 1), None, 1 / 3, "one pixel"),
            Region(4, (2, 2, 3, 2), some, 1e-7, 'rare class "Straße & <road>"\r\nin two lines'),
            Region(5, (8, 0, 1, 1), np.ones((1, 1), bool), 0.25, "a mask of one pixel"),
        )),
        Item("人/мир.tiff", 3, 2, None, 6, 0.1, "no pre-labels"),
        Item("none.png", 4, 4, np.full((4, 4), 255, np.uint8), 7, 0.09, "", (Region(7, (1, 1, 2, 2), None, 0.09, ""),)),
        Item("outside.png", 2, 1, np.array([[0, 255]], np.uint8), 8, 0.08, "x", (Region(8, (1, 0, 1, 1), None, 0.08, "x"),)),
        Item("one.png", 1, 1, np.zeros((1, 1), np.uint8), 9, 0.0, "one pixel"),
        Item("one region.png", 1, 1, np.full((1, 1), 4, np.uint8), 10, 0.0, "", (Region(10, (0, 0, 1, 1), None, 0.0, ""),)),
        Item("full.png", 9, 9, full, 11, 0.05, "all", (Region(11, (0, 0, 9, 9), None, 0.05, "all of it"),)),
        Item("tall.png", 1, 40, random_labels(40, 1, 5, 2), 12, 0.04, "tall"),
        Item("wide.png", 70, 1, random_labels(1, 70, 5, 3), 13, 0.03, "wide"),
    ]  # fmt: skip
    colours = [[1, 2, 3], [0, 0, 0], [1, 2, 3], [1, 2, 4], [255, 255, 255], [0, 0, 0]]
    return TRICKY, np.array(colours, np.uint8), items


def many(C):
    """Every class in one image."""
    labels_HW = np.arange(256, dtype=np.uint8).reshape(16, 16).copy()
    labels_HW[labels_HW >= C] = 255
    colours = np.random.default_rng(0).integers(0, 256, (C, 3), dtype=np.uint8)
    return [f"class {k}" for k in range(C)], colours, [Item("all.png", 16, 16, labels_HW, 1, 0.5, "all classes")]


CASES = {"tricky": tricky(), "many": many(255)}


@pytest.fixture(scope="module", params=CASES)
def handed(request, tmp_path_factory):
    """A folder of hand-over files with the images, the classes, and the items."""
    classes, colours, items = CASES[request.param]
    out = tmp_path_factory.mktemp("handed")
    assert hand_over(out, classes, colours, iter(items)) == []
    for item in items:
        file = out / "images" / item.path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (item.width, item.height)).save(file)
    return out, classes, colours, items


def region_mask(item, region):
    """Which pixels of the image are in the region."""
    mask_HW = np.zeros((item.height, item.width), bool)
    x, y, width, height = region.box
    for j in range(height):
        for i in range(width):
            mask_HW[y + j, x + i] = region.mask_hw is None or region.mask_hw[j, i]
    return mask_HW


def shown(item):
    """Pre-labels by a loop over pixels."""
    out_HW = np.full((item.height, item.width), 255)
    if item.labels_HW is not None:
        masks = [region_mask(item, region) for region in item.regions]
        for y in range(item.height):
            for x in range(item.width):
                if not masks or any(mask[y, x] for mask in masks):
                    out_HW[y, x] = item.labels_HW[y, x]
    return out_HW


def class_masks(item, classes):
    """[[class, rows]] of the classes that are to be seen."""
    shown_HW = shown(item)
    return [[classes[k], rows(shown_HW == k)] for k in range(len(classes)) if (shown_HW == k).any()]


def region_masks(item, label="label this", those=lambda region: True):
    return [[label, rows(region_mask(item, region))] for region in item.regions if those(region)]


def rows(mask):
    return np.asarray(mask).astype(int).tolist()


def test_coco(handed):
    out, classes, _, items = handed
    coco = json.loads((out / "coco.json").read_text())
    names = {each["id"]: each["name"] for each in coco["categories"]}
    assert list(names.items()) == list(enumerate([*classes, "label this"], 1))
    assert [image["file_name"] for image in coco["images"]] == [item.path for item in items]
    assert [each["id"] for each in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for image, item in zip(coco["images"], items, strict=True):
        assert (image["width"], image["height"]) == (item.width, item.height)
        assert (image["rank"], image["score"], image["reason"]) == (item.rank, item.score, item.reason)
        found, boxes, marks = [], [], []
        for ann in (each for each in coco["annotations"] if each["image_id"] == image["id"]):
            assert ann["segmentation"]["size"] == [item.height, item.width] and ann["iscrowd"] == 0
            mask_HW = decode_coco(ann["segmentation"]["counts"], (item.height, item.width))
            assert ann["area"] == mask_HW.sum()
            y, x = np.nonzero(mask_HW)
            boxes.append(ann["bbox"] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1])
            found.append([names[ann["category_id"]], rows(mask_HW)])
            marks.append((ann.get("rank"), ann["score"], ann.get("reason")))
        wanted = class_masks(item, classes)
        assert found == wanted + region_masks(item) and all(boxes)
        confidence = [(None, 1 - item.score, None)] * len(wanted)
        assert marks == confidence + [(each.rank, each.score, each.reason) for each in item.regions]


def test_cvat_xml(handed):
    out, classes, colours, items = handed
    root = ElementTree.parse(out / "cvat.xml").getroot()
    labels = [(each.findtext("name"), each.findtext("color")) for each in root.iterfind("meta/task/labels/label")]
    css = ["#" + "".join(f"{value:02x}" for value in colour) for colour in colours.tolist()]
    assert labels == list(zip([*classes, "label this"], [*css, "#ff00ff"], strict=True))
    types = [
        each.findtext("input_type") for each in root.iterfind("meta/task/labels/label[last()]/attributes/attribute")
    ]
    assert types == ["number", "text", "text"] and len(root.findall("meta/task/labels/label/attributes/attribute")) == 3
    assert [image.get("name") for image in root.iterfind("image")] == [item.path for item in items]
    assert len({image.get("id") for image in root.iterfind("image")}) == len(items)
    for image, item in zip(root.iterfind("image"), items, strict=True):
        assert (int(image.get("width")), int(image.get("height"))) == (item.width, item.height)
        masks, boxes, marks = [], [], []
        for shape in image:
            if shape.tag == "mask":
                left, top, width, height = (int(shape.get(key)) for key in ("left", "top", "width", "height"))
                mask_HW = np.zeros((item.height, item.width), bool)
                own = decode_counts([int(count) for count in shape.get("rle").split(",")], (height, width))
                assert own.any(0)[[0, -1]].all() and own.any(1)[[0, -1]].all(), "the box is tight"
                mask_HW[top : top + height, left : left + width] = own
                masks.append([shape.get("label"), rows(mask_HW)])
            elif shape.tag == "box":
                left, top, right, bottom = (float(shape.get(key)) for key in ("xtl", "ytl", "xbr", "ybr"))
                boxes.append([shape.get("label"), (left, top, right - left, bottom - top)])
            marks += (
                [{each.get("name"): each.text or "" for each in shape}] if shape.get("label") == "label this" else []
            )
        assert masks == class_masks(item, classes) + region_masks(item, those=lambda each: each.mask_hw is not None)
        assert boxes == [["label this", region.box] for region in item.regions if region.mask_hw is None]
        picks = item.regions or [item]
        assert [(int(each["rank"]), float(each["score"]), each["reason"]) for each in marks] == [
            (pick.rank, pick.score, pick.reason) for pick in picks
        ]
        assert len(image.findall("tag")) == (not item.regions)


def test_labels_for_cvat(handed):
    out, classes, colours, _ = handed
    labels = json.loads((out / "cvat-labels.json").read_text())
    assert [label["name"] for label in labels] == [*classes, "label this"]
    assert [bytes.fromhex(label["color"][1:]) for label in labels[:-1]] == [
        bytes(colour) for colour in colours.tolist()
    ]
    assert {label["type"] for label in labels} == {"any"} and not any(label["attributes"] for label in labels[:-1])
    for each in labels[-1]["attributes"]:
        assert each["default_value"] in each["values"] and each["mutable"] is False
    assert [(each["name"], each["input_type"]) for each in labels[-1]["attributes"]] == [
        ("rank", "number"), ("score", "text"), ("reason", "text"),
    ]  # fmt: skip


def test_cvat_masks(handed, tmp_path):
    out, classes, colours, items = handed
    with zipfile.ZipFile(out / "cvat-masks.zip") as archive:
        assert archive.testzip() is None
        assert {each.external_attr >> 16 for each in archive.infolist()} == {0o644}, (
            "unzip makes files that can be read"
        )
        archive.extractall(tmp_path)
    lines = [line.split(":") for line in (tmp_path / "labelmap.txt").read_text("utf-8").splitlines() if line[0] != "#"]
    by_colour = {tuple(map(int, colour.split(","))): name for name, colour, _, _ in lines}
    nothing = "no label_" if "background" in classes else "background"  # where there is no pre-label
    assert list(by_colour.values()) == [nothing, *classes] and by_colour[0, 0, 0] == nothing
    for name, colour in zip(classes, colours.tolist(), strict=True):
        if sum(other == colour for other in [[0, 0, 0], *colours.tolist()]) == 1:
            assert by_colour[tuple(colour)] == name, "a colour that nothing else has is kept"
    listed = (tmp_path / "ImageSets" / "Segmentation" / "default.txt").read_text("utf-8").splitlines()
    assert listed == [item.path.rpartition(".")[0] for item in items]
    for name, item in zip(listed, items, strict=True):
        found = np.array(Image.open(tmp_path / "SegmentationClass" / f"{name}.png").convert("RGB"))
        objects = np.array(Image.open(tmp_path / "SegmentationObject" / f"{name}.png").convert("RGB"))
        shown_HW, seen = shown(item), {}
        for y in range(item.height):
            for x in range(item.width):
                label = by_colour[tuple(found[y, x].tolist())]
                assert label == (nothing if shown_HW[y, x] == 255 else classes[shown_HW[y, x]])
                assert seen.setdefault(label, objects[y, x].tolist()) == objects[y, x].tolist()
        assert seen.pop(nothing, [0, 0, 0]) == [0, 0, 0]
        assert len(set(map(tuple, seen.values())) - {(0, 0, 0)}) == len(seen), "an object a class"


def test_the_first_objects_have_the_colours_of_pascal_voc(tmp_path):
    classes, colours, items = many(255)
    hand_over(tmp_path, classes, colours, items, formats=["cvat-masks"])
    with zipfile.ZipFile(tmp_path / "cvat-masks.zip") as archive, archive.open("SegmentationObject/all.png") as file:
        objects = np.array(Image.open(file).convert("RGB")).reshape(-1, 3)[:4].tolist()
    assert objects == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]


def test_label_studio(handed):
    out, classes, colours, items = handed
    config = ElementTree.parse(out / "label-studio.xml").getroot()
    tags = {tag.get("name"): [label.get("value") for label in tag] for tag in config if tag.get("toName") == "image"}
    assert tags == {"brush": [*classes, "label this"], "rectangle": ["label this"]}
    shades = [label.get("background") for label in config.iterfind("BrushLabels/Label")][:-1]
    assert [bytes.fromhex(shade[1:]) for shade in shades] == [bytes(colour) for colour in colours.tolist()]
    tasks = json.loads((out / "label-studio.json").read_text())
    for task, item in zip(tasks, items, strict=True):
        start, _, path = task["data"]["image"].partition("?d=")
        assert start == "/data/local-files/" and unquote_to_bytes(path).decode() == item.path
        assert not set(path) & set(" &#?+%\"'<>") - set("%") and path.isascii()
        assert [task["data"][key] for key in ("rank", "score", "reason")] == [item.rank, item.score, item.reason]
        (prediction,) = task["predictions"]
        assert prediction["score"] == 1 - item.score
        masks, boxes, marks = [], [], []
        for result in prediction["result"]:
            assert (result["original_width"], result["original_height"]) == (item.width, item.height)
            value = result["value"]
            if result["type"] == "brushlabels":
                (label,) = value["brushlabels"]
                masks.append([label, rows(decode_brush(value["rle"], (item.height, item.width)))])
            else:
                (label,) = value["rectanglelabels"]
                scale = {"x": item.width, "y": item.height, "width": item.width, "height": item.height}
                boxes.append(tuple(value[key] * size / 100 for key, size in scale.items()))
            assert label in tags[result["from_name"]] and result["type"] == f"{result['from_name']}labels"
            marks += [(result["meta"]["rank"], result["score"], result["meta"]["text"])] if "meta" in result else []
        assert masks == class_masks(item, classes) + region_masks(item, those=lambda each: each.mask_hw is not None)
        wanted = [region.box for region in item.regions if region.mask_hw is None]
        np.testing.assert_allclose(np.array(boxes), np.array(wanted), rtol=1e-12)
        assert marks == [(each.rank, each.score, [each.reason]) for each in item.regions]
        assert len({result["id"] for result in prediction["result"]}) == len(prediction["result"])


def test_plain_pictures_and_their_table(handed):
    out, classes, colours, items = handed
    with open(out / "png" / "items.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line, item in zip(lines, items, strict=True):
        assert (line["path"], int(line["rank"]), float(line["score"]), line["reason"]) == (
            item.path, item.rank, item.score, item.reason,
        )  # fmt: skip
        boxes = [tuple(map(int, box.split())) for box in line["boxes"].split(";") if box]
        assert boxes == [region.box for region in item.regions]
        picture = out / "png" / line["labels"]
        np.testing.assert_array_equal(read_label(picture, len(classes), 255), shown(item))
        with Image.open(picture) as opened:
            rgb = np.array(opened.convert("RGB"))
        known_HW = shown(item) != 255
        np.testing.assert_array_equal(rgb[known_HW], colours[shown(item)[known_HW]])


@pytest.mark.skipif(
    not READERS, reason="SEGUNCERT_READERS names no python with the packages of tests/readers/read_back.py"
)
def test_the_readers_of_the_tools_find_the_same(handed):
    out, classes, _, items = handed
    script = Path(__file__).with_name("readers") / "read_back.py"
    run = subprocess.run([READERS, script, out], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)

    def of(reader, key, item):
        named = item.path if item.path in found[reader] else item.path.rpartition(".")[0]
        return found[reader][named][key]

    def masks(reader, item):
        return sorted(each[:2] for each in of(reader, "masks", item))

    for reader in found:
        assert len(found[reader]) == len(items)
    for item in items:
        odd = region_masks(item, those=lambda region: region.mask_hw is not None)
        wanted, marks = class_masks(item, classes), [[each.rank, each.score, each.reason] for each in item.regions]
        boxes = [["label this", *region.box] for region in item.regions if region.mask_hw is None]

        assert masks("pycocotools", item) == masks("datumaro coco", item) == sorted(wanted + region_masks(item))
        confidence = [[None, 1 - item.score, None]] * len(wanted)
        assert of("pycocotools", "marks", item) == confidence + marks
        assert of("pycocotools", "about", item) == [item.width, item.height, item.rank, item.score, item.reason]
        scores = [each[2]["score"] for each in of("datumaro coco", "masks", item)]
        assert sorted(scores) == sorted([1 - item.score] * len(wanted) + [each.score for each in item.regions])

        assert masks("datumaro cvat", item) == masks("cvat-sdk", item) == sorted(wanted + odd)
        assert [each[:5] for each in of("datumaro cvat", "boxes", item)] == boxes
        kinds = (of("datumaro cvat", kind, item) for kind in ("masks", "boxes", "tags"))
        told = [each[-1] for kind in kinds for each in kind if each[0] == "label this"]
        told = sorted([each["rank"], float(each["score"]), each["reason"]] for each in told)
        assert told == sorted(marks or [[item.rank, item.score, item.reason]])

        assert masks("datumaro masks", item) == sorted(wanted)

        assert masks("label-studio-sdk", item) == sorted(wanted + odd)
        for box, region in zip(
            of("label-studio-sdk", "boxes", item), (r for r in item.regions if r.mask_hw is None), strict=True
        ):
            np.testing.assert_allclose(box[1:5], region.box, rtol=1e-12)
        told = [each[-1] for kind in ("masks", "boxes") for each in of("label-studio-sdk", kind, item)]
        assert sorted(each for each in told if each[0] is not None) == sorted(marks)
        assert of("label-studio-sdk", "score", item) == 1 - item.score


def small(path="a.png", **changes):
    """A whole image of 2 x 1 pixels."""
    about = {"path": path, "width": 2, "height": 1, "labels_HW": np.array([[0, 1]], np.uint8)}
    return Item(**about | {"rank": 1, "score": 0.5, "reason": "why"} | changes)


TWO = (["a", "b"], np.array([[1, 1, 1], [2, 2, 2]], np.uint8))


def test_what_a_format_cannot_hold_is_told_and_the_others_hold_it(tmp_path):
    classes = ["a:b", "#c", "a_b", "d\x01", "label this", "\ud800"]
    paths = [
        "x\x02.png",
        "line\nbreak.png",
        "caf\udce9.png",
        "#hash.png",
        " before.png",
        "after .png",
        "twin.png",
        "twin.jpg",
        "twin.jpg.png",
    ]
    labels_HW = np.arange(6, dtype=np.uint8)[None]
    items = [Item(path, 6, 1, labels_HW, k, 0.5, f"reason \x03 {k}") for k, path in enumerate(paths, 1)]
    notes = hand_over(tmp_path, classes, np.arange(18, dtype=np.uint8).reshape(6, 3), items)
    assert notes == [
        "coco.json: label 'label this' is called 'label this_' there",
        "cvat.xml: label 'd\\x01' is called 'd_' there",
        "cvat.xml: label '\\ud800' is called '_' there",
        "cvat.xml: label 'label this' is called 'label this_' there",
        "cvat.xml: images left out for their names: 2, the first 'x\\x02.png'",
        "cvat.xml: reasons with ? for what XML cannot hold: 7, the first 'reason \\x03 2'",
        "cvat-masks.zip: label 'a:b' is called 'a_b' there",
        "cvat-masks.zip: label '#c' is called '_c' there",
        "cvat-masks.zip: label 'a_b' is called 'a_b_' there",
        "cvat-masks.zip: label '\\ud800' is called '_' there",
        "cvat-masks.zip: images left out for their names: 6, the first 'line\\nbreak.png'",
        "label-studio.json: label 'd\\x01' is called 'd_' there",
        "label-studio.json: label '\\ud800' is called '_' there",
        "label-studio.json: label 'label this' is called 'label this_' there",
    ]
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert [each["name"] for each in coco["categories"]] == [*classes, "label this_"]
    assert [each["file_name"] for each in coco["images"]] == paths
    tasks = json.loads((tmp_path / "label-studio.json").read_text())
    found = [unquote_to_bytes(task["data"]["image"].partition("?d=")[2]) for task in tasks]
    assert found == [os.fsencode(path) for path in paths]
    names = [result["value"]["brushlabels"] for result in tasks[0]["predictions"][0]["result"]]
    assert names == [["a:b"], ["#c"], ["a_b"], ["d_"], ["label this"], ["_"]]
    root = ElementTree.parse(tmp_path / "cvat.xml").getroot()
    assert [image.get("name") for image in root.iterfind("image")] == [
        path for path in paths if path[0] != "x" and "caf" not in path
    ]
    assert root.findtext("image/tag/attribute[@name='reason']") == "reason ? 2"
    with open(tmp_path / "png" / "items.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["path"] for line in lines] == paths and len({line["labels"] for line in lines}) == len(paths)
    for line in lines:
        assert read_label(tmp_path / "png" / line["labels"], 6, None).tolist() == labels_HW.tolist()
    with zipfile.ZipFile(tmp_path / "cvat-masks.zip") as archive:
        listed = archive.read("ImageSets/Segmentation/default.txt").decode().splitlines()
    assert listed == ["x\x02", "twin", "twin.jpg"]


def test_nothing_is_seen_of_a_hand_over_that_fails(tmp_path):
    hand_over(tmp_path, *TWO, [small()])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def broken():
        yield small("b.png")
        raise RuntimeError("the second label is damaged")

    with pytest.raises(RuntimeError, match="damaged"):
        hand_over(tmp_path, *TWO, broken())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(tmp_path)) == FILES


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_one_clear_error(tmp_path, format):
    """The kernel refuses files over a limit like a full disk refuses them."""
    noise = np.random.default_rng(0).integers(0, 2, (300, 300), dtype=np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(StoreError, match="no space left to write"):
            hand_over(tmp_path, *TWO, [small(width=300, height=300, labels_HW=noise)], formats=[format])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert os.listdir(tmp_path) == []


def test_a_second_hand_over_takes_the_place_of_the_first(tmp_path):
    hand_over(tmp_path, *TWO, [small("old.png")])
    (tmp_path / ".png.part").mkdir()  # what a crash left
    hand_over(tmp_path, *TWO, [small("new.png")])
    assert sorted(os.listdir(tmp_path)) == FILES
    assert sorted(os.listdir(tmp_path / "png")) == ["items.csv", "new.png"]
    assert b"old" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_folder_that_is_not_ours_stays(tmp_path):
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "photo.png").touch()
    with pytest.raises(
        ValueError, match="png: expected a folder of an earlier hand-over. Received: something else; move it"
    ):
        hand_over(tmp_path, *TWO, [small()])
    assert os.listdir(tmp_path) == ["png"] and os.listdir(tmp_path / "png") == ["photo.png"]


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(StoreError, match="cannot write .*none/coco.json: No such file or directory"):
        hand_over(tmp_path / "none", *TWO, [small()])


def test_one_item_at_a_time_is_in_memory(tmp_path):
    alive, most = weakref.WeakSet(), []

    def stream():
        for k in range(20):
            item = small(f"{k}.png")
            alive.add(item)
            yield item
            most.append(len(alive))

    hand_over(tmp_path, *TWO, stream())
    assert len(most) == 20 and max(most) <= 2, "the one being written, and the one that comes"


def test_no_items_at_all(tmp_path):
    hand_over(tmp_path, *TWO, [])
    assert json.loads((tmp_path / "coco.json").read_text())["images"] == []
    assert json.loads((tmp_path / "label-studio.json").read_text()) == []
    assert ElementTree.parse(tmp_path / "cvat.xml").getroot().find("image") is None
    assert (tmp_path / "png" / "items.csv").read_text() == "path,labels,rank,score,reason,boxes\n"


def test_only_some_formats_and_images_elsewhere(tmp_path):
    hand_over(tmp_path, *TWO, [small("a b.png")], formats=["label-studio"], url_prefix="https://example.org/x/")
    assert sorted(os.listdir(tmp_path)) == ["label-studio.json", "label-studio.xml"]
    (task,) = json.loads((tmp_path / "label-studio.json").read_text())
    assert task["data"]["image"] == "https://example.org/x/a%20b.png"
    with pytest.raises(ValueError, match="formats: expected some of coco, cvat, cvat-masks, .* Received: 'voc'"):
        hand_over(tmp_path, *TWO, [], formats=["voc"])


def test_items_that_fit_nothing(tmp_path):
    for path in ("", "/a.png", "../a.png", "a//b.png", "a/."):
        with pytest.raises(
            ValueError, match=f"path: expected one relative to the folder of images. Received: '{path}'"
        ):
            small(path)
    with pytest.raises(ValueError, match=r"a.png: labels_HW: expected 1 rows of 3. Received: \(1, 2\)"):
        small(width=3)
    with pytest.raises(ValueError, match="a.png: expected at least one pixel. Received: 0x1"):
        small(width=0, labels_HW=None)
    with pytest.raises(ValueError, match="a.png: expected finite scores"):
        small(score=float("nan"))
    for box in ((1, 0, 2, 1), (-1, 0, 1, 1), (0, 0, 0, 1), (0, 1, 1, 1)):
        with pytest.raises(ValueError, match=rf"a.png: expected a box .* within 2x1.* Received: \({box[0]}, "):
            small(regions=(Region(1, box, None, 0.5, ""),))
    with pytest.raises(ValueError, match=r"Received: \(0, 0, 2, 1\) and mask \(2, 1\)"):
        small(regions=(Region(1, (0, 0, 2, 1), np.ones((2, 1), bool), 0.5, ""),))
    with pytest.raises(ValueError, match=r"a.png: mask of \(0, 0, 2, 1\): expected at least one pixel. Received: none"):
        small(regions=(Region(1, (0, 0, 2, 1), np.zeros((1, 2), bool), 0.5, ""),))
    with pytest.raises(ValueError, match="a.png: expected labels from 0 to 1, or 255 for none. Received: 7"):
        hand_over(tmp_path, *TWO, [small(labels_HW=np.array([[0, 7]], np.uint8))])
    with pytest.raises(ValueError, match="items: expected each image once. Received: a.png again"):
        hand_over(tmp_path, *TWO, [small(), small()])
    with pytest.raises(ValueError, match="colours: expected one for each of 2 classes. Received: 1"):
        hand_over(tmp_path, TWO[0], TWO[1][:1], [])
    assert os.listdir(tmp_path) == []
