"""Pictures made worse: against plain formulas and other libraries, the same for a seed, and in proportion to the picture."""

import cv2
import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter

from seguncert.corruptions import CORRUPTIONS, ELECTRONS, SEVERITIES, check_names, corrupt, picture_seed


@pytest.fixture(scope="module")
def scene():
    """Smooth shapes and fine texture, 120 x 160."""
    rng = np.random.default_rng(0)
    shapes = gaussian_filter(rng.random((120, 160, 3)), (6, 6, 0))
    shapes = (shapes - shapes.min()) / np.ptp(shapes) * 200 + 20 + 25 * rng.random((120, 160, 3))
    return shapes.astype(np.uint8)


def flat(value, H=120, W=160):
    return np.full((H, W, 3), value, np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_worse_and_follows_from_the_seed(scene, name):
    before = scene.copy()
    seen = [corrupt(scene, name, severity, seed=5) for severity in SEVERITIES]
    assert (scene == before).all() and all(each.dtype == np.uint8 and each.shape == scene.shape for each in seen)
    change = [np.abs(each.astype(int) - scene).mean() for each in seen]
    if name == "fog":  # its mean says little; severity 4 has as much of it as 3, and finer banks
        change = [scene.std() - (each - gaussian_filter(each.astype(float), (1, 1, 0))).std() for each in seen]
        del change[3]
    assert all(low < high for low, high in zip([0.5, *change], change, strict=False)), change
    assert (corrupt(scene, name, 3, seed=5) == seen[2]).all()
    drawn = name in ("gaussian-noise", "motion-blur", "darkness", "fog")
    assert (corrupt(scene, name, 3, seed=6) != seen[2]).any() == drawn


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(
    "picture", [flat(0), flat(255), flat(77, 1, 1), flat(9, 2, 700)], ids=["black", "white", "one", "strip"]
)
def test_every_picture_can_be_made_worse(name, picture):
    for severity in SEVERITIES:
        assert corrupt(picture, name, severity, seed=0).shape == picture.shape


def test_noise_has_the_deviation_that_is_said():
    noisy = corrupt(flat(128, 300, 400), "gaussian-noise", 1, seed=0)
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.01) and noisy.mean() == pytest.approx(128, abs=0.2)
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.01


def test_defocus_is_the_mean_over_a_disc(scene):
    picture = cv2.resize(scene, (640, 480))
    kernel = np.zeros((13, 13))
    for y in range(13):
        for x in range(13):
            kernel[y, x] = min(1, max(0, 6.5 - np.hypot(y - 6, x - 6)))
    expected = np.dstack(
        [convolve(picture[..., k].astype(float), kernel / kernel.sum(), mode="mirror") for k in range(3)]
    )
    assert np.abs(corrupt(picture, "defocus-blur", 3, seed=0) - expected).max() <= 0.51


def test_motion_draws_things_out_and_leaves_them_in_place():
    picture = flat(0, 480, 480)
    cv2.circle(picture, (250, 240), 8, (255,) * 3, -1)
    y_HW, x_HW = np.mgrid[:480, :480]

    def moments(rgb):
        weight = rgb[..., 0] / rgb[..., 0].sum()
        x, y = (weight * x_HW).sum(), (weight * y_HW).sum()
        xx, yy, xy = ((weight * a * b).sum() for a, b in ((x_HW - x,) * 2, (y_HW - y,) * 2, (x_HW - x, y_HW - y)))
        return x, y, np.linalg.eigvalsh([[xx, xy], [xy, yy]])

    x, y, (across, along) = moments(corrupt(picture, "motion-blur", 5, seed=3))
    assert (x, y) == pytest.approx(moments(picture)[:2], abs=0.2)
    t = np.linspace(-20, 20, 1001)
    variance = np.average(t**2, weights=np.exp(-0.5 * (t / 15) ** 2))
    assert along - moments(picture)[2][1] == pytest.approx(variance, rel=0.1)
    assert across == pytest.approx(moments(picture)[2][0], abs=1)


def test_blur_is_in_proportion_to_the_picture(scene):
    large = cv2.resize(scene, (640, 480), interpolation=cv2.INTER_CUBIC)
    small = cv2.resize(large, (320, 240), interpolation=cv2.INTER_AREA)
    for name in ("defocus-blur", "motion-blur"):
        shrunk = cv2.resize(corrupt(large, name, 5, seed=1), (320, 240), interpolation=cv2.INTER_AREA)
        assert np.abs(corrupt(small, name, 5, seed=1).astype(int) - shrunk).mean() < 1


def test_darkness_halves_the_light_and_keeps_its_shot_noise():
    def light(rgb):
        v = rgb / 255
        return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)

    clean = light(flat(200)).mean()
    for stops in (1, 2, 3):
        dark = light(corrupt(flat(200), "darkness", stops, seed=0))
        assert dark.mean() == pytest.approx(clean / 2**stops, rel=0.01)
        assert dark.var() == pytest.approx(clean / 2**stops / ELECTRONS, rel=0.05)


def test_brightness_adds_to_the_value_alone(scene):
    before, after = (rgb_to_hsv(rgb / 255) for rgb in (scene, corrupt(scene, "brightness", 2, seed=0)))
    np.testing.assert_allclose(after[..., 2], np.minimum(before[..., 2] + 0.2, 1), atol=0.002)
    np.testing.assert_allclose(after[..., 1], before[..., 1], atol=0.02)
    assert (corrupt(flat(0), "brightness", 2, seed=0) == 51).all()


def test_contrast_and_jpeg_are_what_they_are_elsewhere(scene, tmp_path):
    mean = scene.astype(float).mean((0, 1))
    np.testing.assert_allclose(corrupt(scene, "contrast", 4, seed=0), mean + 0.1 * (scene - mean), atol=0.51)
    Image.fromarray(scene).save(tmp_path / "a.jpg", quality=10)
    stored = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)
    assert np.abs(corrupt(scene, "jpeg", 4, seed=0) - stored).mean() < 1


def test_fog_is_the_same_bank_over_every_picture():
    banks = []
    for value in (80, 200):
        x, y = value / 255, corrupt(flat(value), "fog", 5, seed=2)[..., 0] / 255
        banks.append((y * (x + 3) / x - x) / 3)
    np.testing.assert_allclose(*banks, atol=0.02)
    assert banks[1].min() > -0.02 and banks[1].max() < 1.02 and banks[1].std() > 0.1


def test_names_and_seeds_are_checked_and_their_own():
    assert check_names("all") == check_names(["all"]) == tuple(CORRUPTIONS)
    with pytest.raises(
        ValueError, match="corruptions: expected all, or some of gaussian-noise, .*, jpeg. Received: 'snow'"
    ):
        check_names(["fog", "snow"])
    with pytest.raises(ValueError, match="jpeg. Received: none"):
        check_names([])
    with pytest.raises(ValueError, match="expected all, or a list of names. Received: 'fog'"):
        check_names("fog")
    seeds = {picture_seed(seed, path) for seed in (0, 1) for path in ("a.png", "b.png", "caf\udce9.png")}
    assert len(seeds) == 6
