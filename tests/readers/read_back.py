"""What independent readers of the formats find in a hand-over. Runs in an environment of its own:

    pip install pycocotools datumaro label-studio-sdk cvat-sdk
    python read_back.py FOLDER        FOLDER: the files of `hand_over`, and images/

Prints, for each reader, {path or name: {"masks": [[label, rows]], "boxes": [[label, x, y, width, height]], …}}.
datumaro is what CVAT itself reads COCO and segmentation masks with; it names an image without its suffix.
"""

import contextlib
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import datumaro
import numpy as np
from cvat_sdk.masks import decode_mask
from datumaro.components.annotation import AnnotationType, Bbox, Label
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.label_interface import LabelInterface
from pycocotools.coco import COCO


def rows(mask):
    return np.asarray(mask).astype(int).tolist()


def with_pycocotools(folder):
    coco = COCO(folder / "coco.json")
    ours = coco.loadAnns(coco.getAnnIds())
    again = coco.loadRes([{**ann} for ann in ours]) if ours else coco
    found = {}
    for image in coco.loadImgs(coco.getImgIds()):
        masks, marks = [], []
        for ann in coco.loadAnns(coco.getAnnIds(imgIds=image["id"], iscrowd=False)):
            mask = coco.annToMask(ann)
            assert (mask == again.annToMask(again.loadAnns(ann["id"])[0])).all()
            y, x = mask.nonzero()
            box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert ann["area"] == mask.sum() and ann["bbox"] == box
            masks.append([coco.loadCats(ann["category_id"])[0]["name"], rows(mask)])
            marks.append([ann.get("rank"), ann["score"], ann.get("reason")])
        about = [image[key] for key in ("width", "height", "rank", "score", "reason")]
        found[image["file_name"]] = {"masks": masks, "marks": marks, "about": about}
    return found


def with_datumaro(place, format):
    found = {}
    dataset = datumaro.Dataset.import_from(str(place), format)
    names = [label.name for label in dataset.categories()[AnnotationType.label]]
    for item in dataset:
        masks, boxes, tags = [], [], []
        for ann in item.annotations:
            if isinstance(ann, Bbox):
                boxes.append([names[ann.label], ann.x, ann.y, ann.w, ann.h, ann.attributes])
            elif isinstance(ann, Label):
                tags.append([names[ann.label], ann.attributes])
            else:
                masks.append([names[ann.label], rows(ann.image), ann.attributes])
        found[item.id] = {"masks": masks, "boxes": boxes, "tags": tags}
    return found


def datumaro_coco(folder):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "annotations").mkdir()
        shutil.copy(folder / "coco.json", Path(place) / "annotations" / "instances_default.json")
        (Path(place) / "images").symlink_to(folder / "images")
        return with_datumaro(place, "coco_instances")


def datumaro_cvat(folder):
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(folder / "cvat.xml", place)
        (Path(place) / "images").symlink_to(folder / "images")
        return with_datumaro(place, "cvat")


def datumaro_masks(folder):
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(folder / "cvat-masks.zip") as archive:
            archive.extractall(place)
        return with_datumaro(place, "voc_segmentation")


def with_cvat_sdk(folder):
    """Masks as CVAT's server takes them from the XML: the run lengths, then the corners of the box."""
    found = {}
    for image in ElementTree.parse(folder / "cvat.xml").getroot().iter("image"):
        masks = []
        for mask in image.iter("mask"):
            left, top, width, height = (int(mask.get(key)) for key in ("left", "top", "width", "height"))
            points = [*map(int, mask.get("rle").split(",")), left, top, left + width - 1, top + height - 1]
            size = {"image_width": int(image.get("width")), "image_height": int(image.get("height"))}
            masks.append([mask.get("label"), rows(decode_mask(points, **size))])
        found[image.get("name")] = {"masks": masks}
    return found


def with_label_studio(folder):
    interface = LabelInterface((folder / "label-studio.xml").read_text(encoding="utf-8"))
    found = {}
    for task in json.loads((folder / "label-studio.json").read_text()):
        prediction = task["predictions"][0]
        assert interface.validate_task({"data": task["data"]})
        assert interface.validate_prediction(prediction, return_errors=True) == []
        masks, boxes = [], []
        for result in prediction["result"]:
            value, width, height = result["value"], result["original_width"], result["original_height"]
            marks = [result.get("meta", {}).get("rank"), result.get("score"), *result.get("meta", {}).get("text", [])]
            if result["type"] == "brushlabels":
                picture = decode_rle(value["rle"]).reshape(height, width, 4)
                masks.append([value["brushlabels"][0], rows(picture[..., 3] == 255), marks])
            else:
                across, down = width / 100, height / 100
                box = [value["x"] * across, value["y"] * down, value["width"] * across, value["height"] * down]
                boxes.append([value["rectanglelabels"][0], *box, marks])
        path = unquote(task["data"]["image"].partition("?d=")[2])
        found[path] = {"masks": masks, "boxes": boxes, "data": task["data"], "score": prediction["score"]}
    return found


READERS = {
    "pycocotools": with_pycocotools, "datumaro coco": datumaro_coco, "datumaro cvat": datumaro_cvat,
    "datumaro masks": datumaro_masks, "cvat-sdk": with_cvat_sdk, "label-studio-sdk": with_label_studio,
}  # fmt: skip

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # some readers talk
        result = {name: read(Path(sys.argv[1]).resolve()) for name, read in READERS.items()}
    json.dump(result, sys.stdout)
