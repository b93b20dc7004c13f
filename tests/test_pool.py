"""What an export left is read as it was written; what is not whole is refused in one line."""

import json
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

import seguncert
from seguncert.pool import PoolError, read_pool


@pytest.fixture(scope="module")
def exported(small_model, pictures, tmp_path_factory):
    """An export of the pictures with samples and embeddings, and one broken file."""
    source = tmp_path_factory.mktemp("pool")
    shutil.copytree(pictures, source / "in")
    (source / "in" / "broken.png").write_bytes(b"no picture")
    seguncert.export(
        source / "in", source / "out", small_model, method="mc-dropout", samples=3, insert_dropout={"segmentation_head": 0.3},
        embeddings=True, workers=1,
    )  # fmt: skip
    return source / "out"


@pytest.fixture
def copied(exported, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


def test_as_the_files_say(exported):
    pool = read_pool(exported)
    assert len(pool.paths) == 24 and pool.failed == 1 and pool.paths == sorted(pool.paths)
    assert pool.embeddings_ND.shape == (24, pool.run["embedding"]["numbers"]) and (pool.disagreement_N > 0).all()
    beside = np.load(exported / "embeddings.npy")
    rows = (exported / "images.csv").read_text().splitlines()[1:]
    for image, path in enumerate(pool.paths):
        labels_HW = pool.labels(image)
        assert (labels_HW == np.array(Image.open(exported / path / "labels.png"))).all()
        assert labels_HW.shape == tuple(pool.sizes_N2[image])
        assert pool.areas_NC[image].tolist() == [(labels_HW == c).sum() for c in range(3)]
        for name, mean_N in pool.means.items():
            assert pool.map(image, name).mean(dtype=np.float64) == pytest.approx(mean_N[image], abs=1e-5)
        row = next(number for number, line in enumerate(rows) if line.startswith(path + ","))
        assert (beside[row] == pool.embeddings_ND[image]).all()
        assert pool.photo(image).shape[:2] == labels_HW.shape == pool.overlay(image).shape[:2]


@pytest.mark.parametrize("format", ["npy", "tiff"])
def test_maps_of_other_formats(small_model, pictures, tmp_path, format, exported):
    if format == "tiff":
        pytest.importorskip("tifffile")
    source = tmp_path / "in"
    source.mkdir()
    for file in sorted(pictures.rglob("*.*"))[:2]:
        shutil.copy(file, source)
    seguncert.export(source, tmp_path / "out", small_model, format=format, workers=1)
    seguncert.export(source, tmp_path / "png", small_model, workers=1)
    other, png = read_pool(tmp_path / "out"), read_pool(tmp_path / "png")
    assert other.embeddings_ND is None and other.disagreement_N is None
    for image in range(2):
        assert np.abs(other.map(image, "entropy") - png.map(image, "entropy")).max() <= 0.5001 / 65535


def damage_model(out):
    run = json.loads((out / "run.json").read_text())
    run["model"]["classes"] = ["a", "b"]
    (out / "run.json").write_text(json.dumps(run))


def damage_embedding(out):
    run = json.loads((out / "run.json").read_text())
    run["embedding"]["numbers"] += 1
    (out / "run.json").write_text(json.dumps(run))


def stop_early(out):
    table = (out / "images.csv").read_text()
    (out / "images.csv").write_text(table.replace(",ok,", ",left,", 5))


def age(out):
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("areas", None)
    (out / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "harm, said",
    [
        (damage_model, "expected for .* 2 classes, maps .* Received: 3 classes.*of another model or export"),
        (damage_embedding, "numbers of an embedding, as run.json says. Received: 3 classes"),
        (stop_early, "the export is not finished: 5 of 25 images are left. Give the same command again first."),
        (lambda out: (out / "images.csv").unlink(), "is not finished: there is no images.csv"),
        (lambda out: (out / "run.json").unlink(), "EXPORTED: expected a folder that `seguncert export` wrote. Received: .* no run.json"),
        (lambda out: (out / "run.json").write_text("{"), "run.json is damaged"),
        (lambda out: (out / "ledger.jsonl").write_text("{\n"), "line 1 is damaged"),
        (lambda out: (out / "ledger.jsonl").unlink(), "ledger.jsonl: No such file"),
        (age, "an older seguncert wrote it. Export the images again"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused(copied, harm, said):
    harm(copied)
    with pytest.raises(PoolError, match=said) as error:
        read_pool(copied)
    assert "\n" not in str(error.value)


def test_a_map_that_is_gone_or_damaged_is_named(copied):
    pool = read_pool(copied)
    file = copied / pool.paths[3] / "entropy.png"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(PoolError, match="is damaged.*remove that folder and run the same export again"):
        pool.map(3, "entropy")
    for content in (b"", (copied / pool.paths[3] / "labels.png").read_bytes()):
        file.write_bytes(content)
        with pytest.raises(PoolError, match="is damaged.*remove that folder and run the same export again"):
            pool.map(3, "entropy")
    (copied / pool.paths[3] / "labels.png").write_bytes(b"GIF89a")
    with pytest.raises(PoolError, match="labels.png is damaged"):
        pool.labels(3)
    file.unlink()
    with pytest.raises(PoolError, match="entropy.png: No such file or directory. Run the same export again"):
        pool.map(3, "entropy")


def test_images_that_were_taken_away_are_not_in_the_pool(copied):
    rows = (copied / "images.csv").read_text().splitlines(keepends=True)
    (copied / "images.csv").write_text("".join(row for row in rows if "drive 1/" not in row))
    assert {path.split("/")[0] for path in read_pool(copied).paths} == {"drive 0"}


def test_a_photo_that_is_another_now_is_none(exported, tmp_path):
    pool = read_pool(exported)
    pool.run["input"] = str(tmp_path)
    assert pool.photo(0) is None
    (tmp_path / pool.paths[0]).parent.mkdir(parents=True)
    cv2.imwrite(str(tmp_path / pool.paths[0]), np.zeros((5, 5, 3), np.uint8))
    assert pool.photo(0) is None
