"""Embeddings against plain passes and plain loops; the maps keep their bits, and the net is left as it was."""

import base64
import json
import re
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from calls import call
from conftest import CARD, CONFIG
from test_batch import ledger_of, rows_of, tree
from test_prefix import NETS, assert_state, state_of, wrap
from torch import nn

import seguncert
from seguncert import batch, embedding, image, job, tiles
from seguncert.batch import export, list_images
from seguncert.dropout import Masks
from seguncert.embedding import Embedder, choose, projection
from seguncert.job import Job
from seguncert.model import ModelError, build_net, evaluating, net_logits, save_model, wrap_model
from seguncert.predict import net_input, resize_photo
from seguncert.prefix import Session, in_session, intercepting, make_plan
from seguncert.run import Settings, predict_photo

H, W = 75, 110
DEEPEST = {
    "fpn": ("decoder.seg_blocks.0.block.0.block", 128),  # of 128 x 192 pixels 4 x 6, then the first to be made larger
    "unet": ("decoder.center", 128),  # nothing, behind the encoder
    "deeplab": ("decoder.aspp", 256),
    "torchvision": ("classifier.3", 256),  # before the convolution that gives the logits
    "segformer": ("segformer.stages.3", 256),
    "in place": ("side", 12),
    "writes later": ("drop", 8),
    "shared": ("drop", 8),
}


class Deep(nn.Module):
    """Features at a quarter of the size, with a squeeze to one place beside them, and as many logits as anything."""

    def __init__(self, K=8, p=0.0):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 6, 3, 2, padding=1), nn.Conv2d(6, K, 3, 2, padding=1)
        self.squeeze, self.excite = nn.AdaptiveAvgPool2d(1), nn.Conv2d(K, K, 1)
        self.drop = nn.Dropout2d(p) if p else None
        self.coarse, self.last = nn.Conv2d(K, 2, 1), nn.Conv2d(6, 2, 3, padding=1)

    def features(self, x):
        return nn.functional.conv2d(self.stem(x).relu(), self.deep.weight, self.deep.bias, 2, 1)

    def forward(self, x):
        fine = self.stem(x).relu()
        deep = self.deep(fine)
        deep = deep * self.excite(self.squeeze(deep)).sigmoid()
        coarse = self.coarse(self.drop(deep) if self.drop else deep)
        return self.last(fine) + nn.functional.interpolate(coarse, scale_factor=2)


@pytest.fixture(scope="module")
def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (W, H), interpolation=cv2.INTER_CUBIC)


def net_of(name):
    torch.manual_seed(0)
    return wrap(NETS[name]())


def deep(K=8, p=0.0, seed=0):
    torch.manual_seed(seed)
    return wrap_model(Deep(K, p), ["a", "b"], name=f"deep {seed}", divisor=4)


def prepared(models, method="none", **more):
    settings = Settings(method, **more)
    work = Job(Path(), settings, embeddings=True)
    net, sampler, _ = work.engine(models, 1)
    return settings, net, sampler, work.embedder(models, sampler)


def embedding_of(prepared, rgb):
    settings, net, sampler, embedder = prepared
    if sampler is None and settings.needs_sampler(net, *rgb.shape[:2]):
        sampler = settings.sampler([net])
    with embedder.listening(), embedder.photo() as pooled:
        found = predict_photo(net, sampler, rgb, settings)
    return embedder.embedding(pooled), found


# Which features


@pytest.mark.parametrize("method", ["none", "mc-dropout", "tta", "mc-dropout+tta"])
@pytest.mark.parametrize("name", NETS)
def test_the_deepest_module_is_found_in_whatever_way_the_net_is_run(name, method):
    model = net_of(name)
    before = state_of(model.module)
    _, _, _, embedder = prepared([model], method)
    assert (embedder.module, embedder.K) == DEEPEST[name]
    assert_state(model.module, before)


@pytest.mark.parametrize(
    "seen, expected",
    [
        ([("a", (1, 8, 16, 24)), ("b", (1, 9, 4, 6)), ("c", (1, 7, 8, 12))], ("b", 9)),
        ([("a", (1, 8, 4, 6)), ("b", (1, 9, 4, 6)), ("c", (1, 7, 8, 12))], ("b", 9)),  # the last of the smallest
        ([("a", (1, 8, 4, 6)), ("b", (1, 9, 1, 1)), ("c", (1, 9, 1, 2))], ("a", 8)),  # squeezed
        ([("a", (1, 8, 4, 6)), ("b", (1, 9, 2, 2)), ("c", (1, 4, 24, 24))], ("a", 8)),  # pooled to a size; attention
        ([("a", (1, 8, 4, 6)), ("b", (1, 24, 8)), ("c", (6, 8, 2, 3))], ("a", 8)),  # tokens; windows
        ([("a", (1, 8, 4, 6)), ("b", (1, 3, 4, 6)), ("c", (1, 3, 2, 3))], ("a", 8)),  # logits, also coarse ones
        ([("a", (1, 8, 8, 12)), ("b", (1, 8, 4, 6)), ("b", (1, 8, 8, 12))], ("a", 8)),  # one module at two sizes
        ([("a", (1, 8, 3, 5)), ("b", (1, 8, 4, 5))], ("a", 8)),
        ([("a", (1, 3, 4, 6)), ("b", (1, 8, 1, 1))], None),
        ([], None),
    ],
)
def test_which_output_is_the_deepest(seen, expected):
    assert choose(seen, 3) == expected


class Flat(nn.Module):
    def forward(self, x):
        return x[:, :2] * 1.0


def test_a_net_that_has_none_is_refused_in_one_line(pictures, tmp_path):
    message = (
        "net: embeddings: expected a module inside the net that gives features of a picture's proportions, 2 x 2 places"
        " or more. Received: none such. Leave embeddings out."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        export(pictures, tmp_path / "out", wrap_model(Flat(), ["a", "b"], name="net"), embeddings=True)
    assert not (tmp_path / "out").exists()


def test_the_picture_that_is_tried_is_of_the_divisor():
    sizes = []
    for divisor in (1, 28, 32, 128):
        torch.manual_seed(0)
        model = wrap_model(Deep(), ["a", "b"], divisor=divisor)
        hook = model.module.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[2:])))
        prepared([model])
        hook.remove()
    assert sizes == [(128, 192), (168, 252), (128, 192), (256, 384)]


# What is made of them


def test_one_pass_is_the_mean_of_the_features(photo):
    model = deep()
    found, _ = embedding_of(prepared([model]), photo)
    with torch.inference_mode():
        features = model.module.features(net_input(model, photo))
    assert features.shape[2:] == (19, 28)
    np.testing.assert_allclose(found, features.double().mean((0, 2, 3)), rtol=1e-6)
    assert found.dtype == np.float32 and np.ptp(found) > 0.01


def test_views_and_their_places_count_alike(photo):
    model = deep()
    found, _ = embedding_of(prepared([model], "tta", views=("flip", "0.5"), scale="native"), photo)
    total, places = 0, 0
    for rgb in (photo, resize_photo(photo, round(H / 2), round(W / 2))):
        for seen in (rgb, np.ascontiguousarray(rgb[:, ::-1])):
            with torch.inference_mode():
                features = model.module.features(net_input(model, seen))
            total = total + features.double().sum((0, 2, 3))
            places += features[0, 0].numel()
    np.testing.assert_allclose(found, total / places, rtol=1e-5)


def test_of_an_ensemble_it_is_the_first_net(photo):
    first, second = deep(seed=0), deep(seed=1)
    alone, _ = embedding_of(prepared([first]), photo)
    other, _ = embedding_of(prepared([second]), photo)
    found, _ = embedding_of(prepared([first, second], "ensemble"), photo)
    np.testing.assert_array_equal(found, alone)
    assert np.abs(found - other).max() > 0.01


@pytest.mark.parametrize("method", ["none", "tta"])
def test_tiles_count_by_their_places(method, monkeypatch):
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    rgb = cv2.resize(coarse, (900, 700), interpolation=cv2.INTER_CUBIC)
    model, given = deep(), []
    ready = prepared([model], method, tile=512, **({"views": ("flip",)} if method == "tta" else {}))
    hook = model.module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].clone()))
    found, _ = embedding_of(ready, rgb)
    hook.remove()
    assert len({each.shape for each in given}) > 1 and len(given) >= 4
    with torch.inference_mode():
        features = [model.module.features(each)[0].double().flatten(1) for each in given]
    np.testing.assert_allclose(found, torch.cat(features, 1).mean(1), rtol=1e-5)


def own_projection(K):
    """The same rows by LAPACK: orthonormal, each on the side of the row it was made of."""
    normal = np.random.Generator(np.random.PCG64(0)).standard_normal((64, K))
    q, r = np.linalg.qr(normal.T)
    return (q * np.sign(np.diag(r))).T * np.sqrt(K / 64)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["none", "mc-dropout"])
def test_of_each_net_it_is_the_mean_over_full_passes(name, method, photo):
    model, features = net_of(name), []
    samples = {"samples": 3} if method != "none" else {}
    settings, net, sampler, embedder = prepared([model], method, **samples)
    found, (logits, *_) = embedding_of((settings, net, sampler, embedder), photo)
    plain, *_ = predict_photo(net, sampler, photo, settings)
    assert torch.equal(logits, plain), "to listen changes no bit of the maps"

    value = net_input(model, photo)
    hook = model.module.get_submodule(embedder.module).register_forward_hook(lambda *each: features.append(each[2].clone()))  # fmt: skip
    with torch.inference_mode(), evaluating(model.module):
        if method == "none":
            net_logits(model, value)
        else:
            plan = sampler.plan
            with intercepting(model.module, plan.names):
                for sample in range(3):
                    session = Session(plan)
                    session.begin(Masks(0, [sample]), full=True)
                    with in_session(session):
                        net_logits(model, value)
    hook.remove()
    expected = torch.cat([each.double().mean((2, 3)) for each in features]).mean(0).numpy()
    if embedder.K > 64:
        expected = own_projection(embedder.K) @ expected
    assert len(found) == min(embedder.K, 64)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    if name in ("segformer", "writes later") and method == "mc-dropout":
        assert len({each.double().sum().item() for each in features}) == 3, "it is behind the dropout"


@pytest.mark.parametrize("K", [65, 320, 2048])
def test_the_projection_keeps_distances_on_average(K):
    rows = projection(K)
    np.testing.assert_allclose(rows @ rows.T, np.eye(64) * K / 64, atol=1e-10 * K)
    np.testing.assert_allclose(rows, own_projection(K), atol=1e-9)
    points = np.random.default_rng(1).normal(0, 1, (400, K)) ** 3
    before = np.linalg.norm(points[:200] - points[200:], axis=1)
    after = np.linalg.norm((points[:200] - points[200:]) @ rows.T, axis=1)
    assert np.mean((after / before) ** 2) == pytest.approx(1, abs=0.04)
    assert np.abs(after / before - 1).max() < 0.4


def test_up_to_64_channels_stay_as_they_are(photo):
    _, _, _, embedder = prepared([deep(64)])
    assert embedder.how == {"module": "deep", "channels": 64, "numbers": 64, "projection": None}
    _, _, _, embedder = prepared([deep(65)])
    made = "64 orthonormal rows times sqrt(65 / 64), numpy PCG64, seed 0"
    assert embedder.how == {"module": "deep", "channels": 65, "numbers": 64, "projection": made}


# The net is left alone


@pytest.mark.parametrize("fails", [False, True])
def test_the_net_is_left_as_it_was(fails, photo):
    model = deep(p=0.3)
    model.module.train()
    before = state_of(model.module)
    settings, net, sampler, embedder = prepared([model], "mc-dropout")
    assert_state(model.module, before)
    if fails:
        with pytest.raises(KeyError), embedder.listening(), embedder.photo():
            predict_photo(net, sampler, photo, settings)
            raise KeyError
    else:
        embedding_of((settings, net, sampler, embedder), photo)
    assert_state(model.module, before)
    predict_photo(net, sampler, photo, settings)
    assert getattr(embedding._of_thread, "taking", None) is None


def test_a_probe_that_fails_leaves_no_hook():
    model = deep()
    before = state_of(model.module)
    with pytest.raises(KeyError):
        Embedder(model, lambda rgb: {}[0])
    assert_state(model.module, before)


def test_threads_and_runs_side_by_side_take_their_own(photo):
    model = deep()
    photos = [np.ascontiguousarray(np.roll(photo, 9 * k, axis=1)[:, : W - 8 * k]) for k in range(4)]
    runs = [prepared([model]), prepared([model])]
    expected = [embedding_of(runs[0], rgb)[0] for rgb in photos]
    found = [[None] * 4, [None] * 4]

    def take(run, k):
        _, net, sampler, embedder = runs[run]
        for _ in range(5):
            with embedder.photo() as pooled:
                predict_photo(net, sampler, photos[k], runs[run][0])
            found[run][k] = embedder.embedding(pooled) if pooled.places == 19 * (28 - 2 * k) else None

    threads = [threading.Thread(target=take, args=(run, k)) for run in (0, 1) for k in range(4)]
    with runs[0][3].listening(), runs[1][3].listening():
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    for run in (0, 1):
        assert all((a == b).all() for a, b in zip(found[run], expected, strict=True)), "each place once, the same bits"


# The export


@pytest.fixture(scope="module")
def exported(pictures, small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded")
    export(pictures, out, small_model, embeddings=True, workers=1, device="cpu")
    return out


def test_an_export_with_embeddings(exported, pictures, small_model):
    run, lines, table = json.loads((exported / "run.json").read_text()), ledger_of(exported), rows_of(exported)
    K = run["embedding"]["channels"]
    assert run["embedding"]["module"] == "decoder.center" and K > 64 == run["embedding"]["numbers"]
    stored = np.load(exported / "embeddings.npy")
    assert stored.shape == (24, 64) and stored.dtype == np.float32
    model = seguncert.load_model(small_model, "cpu")
    for row, path in zip(stored, table, strict=True):
        assert (np.frombuffer(base64.b64decode(lines[path]["embedding"]), "<f4") == row).all()
    for number, path in list(enumerate(table))[::7]:
        value = net_input(model, seguncert.read_image(pictures / path).rgb)
        with torch.inference_mode():
            features = model.module.encoder(value)[-1]
        expected = own_projection(K) @ features.double().mean((0, 2, 3)).numpy()
        np.testing.assert_allclose(stored[number], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_maps_are_those_of_an_export_without(exported, pictures, small_model, tmp_path):
    export(pictures, tmp_path, small_model, device="cpu")
    plain, found = tree(tmp_path), tree(exported)
    assert not (tmp_path / "embeddings.npy").exists() and found.pop("embeddings.npy")
    assert plain.pop("run.json") != found.pop("run.json")
    assert plain == found


@pytest.mark.parametrize("method", ["none", "mc-dropout"])
def test_any_number_of_workers_and_any_break_give_the_same_bits(method, exported, pictures, small_model, tmp_path):
    settings = {"embeddings": True, "device": "cpu", "method": method}
    if method != "none":
        settings |= {"samples": 3, "insert_dropout": {"decoder.center": 0.3}}  # also behind the dropout
        exported = tmp_path / "one"
        export(pictures, exported, small_model, workers=1, **settings)
        assert json.loads((exported / "run.json").read_text())["embedding"]["module"] == "decoder.center"

    def stop_after_nine(done, failed, total):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(pictures, tmp_path / "out", small_model, workers=3, progress=stop_after_nine, **settings)
    stored = np.load(tmp_path / "out" / "embeddings.npy")
    status = [row["status"] for row in rows_of(tmp_path / "out").values()]
    assert 9 <= status.count("ok") < 24 and status.count("left") == 24 - status.count("ok")
    assert [not np.isnan(row).any() for row in stored] == [each == "ok" for each in status]
    assert all(np.isnan(row).all() for row, each in zip(stored, status, strict=True) if each == "left")
    export(pictures, tmp_path / "out", small_model, workers=3, **settings)
    assert tree(tmp_path / "out") == tree(exported)
    one, other = ledger_of(tmp_path / "out"), ledger_of(exported)
    assert {path: line["embedding"] for path, line in one.items()} == {path: line["embedding"] for path, line in other.items()}  # fmt: skip


def test_in_a_process_of_its_own_it_is_the_same(exported, pictures, small_model, tmp_path):
    victim = sorted(list_images(pictures)[0])[5]
    with pytest.raises(KeyboardInterrupt):
        export(pictures, tmp_path, small_model, embeddings=True, device="cpu", workers=1, progress=_stop)
    with open(tmp_path / "ledger.jsonl", "a") as lines:
        lines.writelines(json.dumps({"path": victim, "status": "interrupted"}) + "\n" for _ in range(batch.CRASHES))
    export(pictures, tmp_path, small_model, embeddings=True, device="cpu", workers=1)
    assert tree(tmp_path) == tree(exported)


def _stop(done, failed, total):
    if done == 2:
        raise KeyboardInterrupt


def test_a_large_picture_has_one_of_all_its_blocks(pictures, small_model, tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    rgb = cv2.resize(cv2.imread(str(next(pictures.rglob("*.png")))), (610, 433), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(source / "large.png"), rgb)
    settings = {"embeddings": True, "device": "cpu", "scale": "native"}
    export(source, tmp_path / "whole", small_model, **settings)
    monkeypatch.setattr(job, "LARGE", 1000)
    monkeypatch.setattr(image, "LARGE", 1000)
    monkeypatch.setattr(tiles, "WHOLE", 1000)
    monkeypatch.setattr(tiles, "BLOCK", 4 * 7 * 250**2)
    export(source, tmp_path / "cut", small_model, **settings)
    whole, cut = (np.load(tmp_path / each / "embeddings.npy") for each in ("whole", "cut"))
    np.testing.assert_allclose(cut, whole, atol=1e-3 * np.abs(whole).max())


class Infinite(Deep):
    """Features that are not finite where a picture is white, and logits that do not show it."""

    def forward(self, x):
        deep = self.deep(self.stem(x).relu() + torch.where(x.mean() > 2, torch.inf, 0.0))
        return x[:, :2] + 0 * deep.nan_to_num(0, 0, 0).mean()


class Sometimes(Deep):
    """Features that some pictures do without."""

    def forward(self, x):
        return x[:, :2] * 1.0 if x.mean() > 2 else super().forward(x)


@pytest.mark.parametrize(
    "net, message",
    [
        (Infinite, "net: the features of deep are not finite for this picture"),
        (Sometimes, "net: embeddings: expected features of deep for this picture. Received: none, the net did not run it. Leave embeddings out."),
    ],
)  # fmt: skip
def test_an_image_without_finite_features_fails_in_one_line(net, message, tmp_path):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), np.full((64, 64, 3), 90, np.uint8))
    cv2.imwrite(str(tmp_path / "in" / "white.png"), np.full((64, 64, 3), 255, np.uint8))
    model = wrap_model(net(), ["a", "b"], name="net", divisor=4)
    result = export(tmp_path / "in", tmp_path / "out", model, embeddings=True)
    assert (result.done, result.failed) == (1, 1)
    assert rows_of(tmp_path / "out")["white.png"]["error"] == message
    stored = np.load(tmp_path / "out" / "embeddings.npy")
    assert np.isfinite(stored[0]).all() and np.isnan(stored[1]).all()


def test_openvino_is_refused_and_auto_is_torch(pictures, small_model, tmp_path):
    message = (
        "embeddings: expected with them the backend torch or auto, since OpenVINO does not show a net's inner features."
        " Received: openvino. Set another backend, or leave embeddings out."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        export(pictures, tmp_path / "out", small_model, embeddings=True, backend="openvino")
    assert not (tmp_path / "out").exists()
    export(pictures, tmp_path / "out", small_model, embeddings=True, backend="auto")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["backend"] == "torch fp32"


def test_the_command(pictures, small_model, tmp_path):
    arguments = ("export", pictures, tmp_path / "out", "--model", small_model, "--embeddings")
    code, _, told = call(*arguments, "--backend", "openvino")
    assert code == 2 and "embeddings: expected with them the backend torch or auto" in told
    code, _, told = call(*arguments)
    assert code == 0, told
    assert np.isfinite(np.load(tmp_path / "out" / "embeddings.npy")).all()


def test_half_precision_shows_its_features_too(photo):
    model = deep()
    found = []
    for precision in ("fp32", "bf16"):
        work = Job(Path(), Settings(), precision=precision, embeddings=True)
        net, sampler, _ = work.engine([model], 1)
        found.append(embedding_of((Settings(), net, sampler, work.embedder([model], sampler)), photo)[0])
    assert (found[0] != found[1]).any()
    np.testing.assert_allclose(*found, atol=0.02 * np.abs(found[0]).max())


def test_an_export_begun_without_them_is_not_gone_on_with(pictures, small_model, tmp_path):
    export(pictures, tmp_path, small_model)
    with pytest.raises(seguncert.StoreError, match="begun with other settings .embedding: null then, "):
        export(pictures, tmp_path, small_model, embeddings=True)


def test_photos_that_look_alike_lie_close(tmp_path):
    """Also of a net of random weights: the same photo, brighter, against others."""
    torch.manual_seed(0)
    save_model(tmp_path / "net", build_net(CONFIG), CONFIG, CARD)
    ready = prepared([seguncert.load_model(tmp_path / "net", "cpu")])
    rng = np.random.default_rng(0)
    photos = [cv2.resize(rng.integers(0, 200, (n, n, 3), dtype=np.uint8), (96, 64)) for n in (3, 6, 12, 24)]
    one, other = (np.stack([embedding_of(ready, rgb + np.uint8(more))[0] for rgb in photos]) for more in (0, 5))
    distance = np.linalg.norm(one[:, None] - other[None], axis=2)
    assert (distance.argmin(1) == np.arange(4)).all()


def test_the_plan_is_made_before_anything_listens():
    """A plan of one's own sees the same settled calls while an embedder listens."""
    model = net_of("unet")
    names = {"dropout_before_decoder_blocks_1", "dropout_before_segmentation_head"}
    before = make_plan(model, names)
    _, _, _, embedder = prepared([model], "mc-dropout")
    with embedder.listening(), embedder.photo():
        assert make_plan(model, names).settled == before.settled
