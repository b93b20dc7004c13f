"""Lists of what is labelled, in the forms that people have them."""

import csv

import numpy as np
import pytest
from PIL import Image

from seguncert.labelled import read_labelled

PATHS = ["a/1.png", "a/2.png", "b/ä ö.jpg", "c.webp"]


def test_text_files_with_and_without_suffix(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes("\ufeffa/1.png\r\n\n  b/ä ö  \nc.png\n".encode())
    assert read_labelled([file], PATHS).images == {"a/1.png", "b/ä ö.jpg", "c.webp"}


def test_tables_and_several_lists(tmp_path):
    (tmp_path / "one.csv").write_text("name,path\nx,a/1.png\n")
    (tmp_path / "two.txt").write_text("c.webp\n")
    found = read_labelled([tmp_path / "one.csv", tmp_path / "two.txt"], PATHS)
    assert found.images == {"a/1.png", "c.webp"} and not found.parts
    assert found.whole("c.webp") and not found.whole("a/2.png")


def test_regions_of_earlier_rounds(tmp_path):
    header = "rank,path,unit,x,y,width,height,number\n"
    (tmp_path / "selection.csv").write_text(
        header + "1,a/1.png,region,2,3,4,2,7\n2,a/2.png,segment,0,0,5,5,2\n3,c.webp,image,0,0,9,9,0\n"
    )
    numbers = np.zeros((8, 10), np.uint16)
    numbers[1, 1:4] = 2
    numbers[5, 5] = 3
    (tmp_path / "regions" / "a").mkdir(parents=True)
    Image.fromarray(numbers).save(tmp_path / "regions" / "a" / "2.png.png")
    found = read_labelled([tmp_path / "selection.csv"], PATHS)
    assert found.images == {"c.webp"} and found.parts == {"a/1.png", "a/2.png"}
    box = np.zeros((8, 10), bool)
    box[3:5, 2:6] = True
    assert (found.mask("a/1.png", 8, 10) == box).all()
    assert (found.mask("a/2.png", 8, 10) == (numbers == 2)).all()
    assert found.mask("c.webp", 2, 2).all() and found.mask("b/ä ö.jpg", 2, 2) is None


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("l.txt", "a/1.png\na/9.png\n", "l.txt, line 2: expected the path of an image of the export"), ("l.csv", "file\na/1.png\n", "a table with a column path"),
        ("l.csv", "path,unit,x\na/1.png,region,3\n", "expected whole numbers x, y, width, height, number"), ("l.txt", "a/1.0\n", "of which there is none"),
        ("l.csv", "path\n\n,\n", "of which there is none"), ("l.txt", "twice\n", "which may be twice.png or twice.jpg. Write its suffix."),
        ("l.csv", "path,unit,x,y,width,height,number\na/1.png,segment,0,0,2,2,1\n", "expected beside it l-regions/a/1.png.png, which says where its segments are"),
        ("random.csv", "path,unit,x,y,width,height,number\na/1.png,superpixel,0,0,2,2,1\n", "expected beside it random-regions/a/1.png.png"),
    ],
)  # fmt: skip
def test_lists_that_are_wrong(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        read_labelled([tmp_path / name], [*PATHS, "twice.png", "twice.jpg"])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_names_that_only_tables_can_hold(tmp_path):
    paths = ["ff\x0cx.png", "cr\rx.png", " lead.png", "lead.png"]
    with open(tmp_path / "t.csv", "w", newline="") as table:
        csv.writer(table, quoting=csv.QUOTE_ALL).writerows([["path"], *([path] for path in paths[:3])])
    assert read_labelled([tmp_path / "t.csv"], paths).images == set(paths[:3])


def test_masks_of_another_picture_are_refused(tmp_path):
    (tmp_path / "regions" / "a").mkdir(parents=True)
    Image.fromarray(np.ones((4, 4), np.uint16)).save(tmp_path / "regions" / "a" / "1.png.png")
    for number, shape in ((1, (5, 5)), (2, (4, 4))):
        (tmp_path / "selection.csv").write_text(
            f"path,unit,x,y,width,height,number\na/1.png,segment,0,0,2,2,{number}\n"
        )
        with pytest.raises(ValueError, match="of another image or selection"):
            read_labelled([tmp_path / "selection.csv"], PATHS).mask("a/1.png", *shape)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="labelled: expected a list of images. Received: .*none.txt"):
        read_labelled([tmp_path / "none.txt"], PATHS)
    with pytest.raises(ValueError, match="labelled: expected a list of images"):
        read_labelled([tmp_path], PATHS)
