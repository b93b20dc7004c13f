"""Which images are drawn together."""

from collections import Counter

from seguncert.clusters import find_clusters


def test_sequences_are_clusters_where_there_are_several():
    paths = [f"{drive}/{k:03}.png" for drive in "abcde" for k in range(3)]
    clusters = find_clusters(paths)
    assert Counter(clusters.of.values()) == {f"{drive}/000.png": 3 for drive in "abcde"}
    assert clusters.about.startswith("a sequence each")


def test_few_sequences_are_cut_into_blocks_of_neighbours():
    paths = [f"0016E5_{k:05}.png" for k in range(7959, 8161, 2)] + [f"0001TP_{k}.png" for k in range(9, 18)]
    clusters = find_clusters(paths)
    sizes = Counter(clusters.of.values())
    assert sorted(sizes.values()) == [2] + [3] * 3 + [11] * 9
    assert sizes["0001TP_9.png"] == 3, "in the order of the number, not of the text"
    assert "only 2 sequences" in clusters.about and "not of other sequences" in clusters.about


def test_names_without_neighbours_are_clusters_of_one():
    clusters = find_clusters(["cat.png", "dog.png", "x/cat.png"])
    assert len(set(clusters.of.values())) == 3 and clusters.about.startswith("an image each")


def test_one_image():
    assert find_clusters(["a_1.png"]).of == {"a_1.png": "a_1.png"}
