"""Loading, wrapping and the ways in which both must refuse."""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from torch import nn

from seguncert.model import (
    Model,
    ModelError,
    build_net,
    bundled_folder,
    bundled_names,
    evaluating,
    load_model,
    load_net,
    net_logits,
    put_dropout,
    wrap_model,
)


@pytest.fixture
def folder(tmp_path, small_model):
    return shutil.copytree(small_model, tmp_path / "small")


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("name", bundled_names())
def test_bundled_models_keep_their_bounds(name):
    model = load_model(name, "cpu")
    assert sum(parameter.numel() for parameter in model.module.parameters()) <= 6e6
    assert sum(file.stat().st_size for file in bundled_folder(name).iterdir()) <= 25e6
    assert not model.module.training
    assert [part.p for part in model.module.modules() if isinstance(part, nn.Dropout2d)], "no dropout to sample with"
    assert model.card["licence"] and model.card["trained_on"]


def test_bundled_are_these():
    assert bundled_names() == ["nuclei", "street"]


def test_a_folder_loads_and_gives_what_was_saved(folder):
    model = load_model(folder, "cpu")
    assert model.classes == ("a", "b", "c") and model.frame is None and model.colours.shape == (3, 3)
    torch.manual_seed(0)
    saved = (
        build_net(json.loads((folder / "config.json").read_text()))
        .half()
        .float()
        .eval()
        .to(memory_format=torch.channels_last)
    )
    picture = torch.rand(1, 3, 64, 32)
    with torch.inference_mode():
        assert torch.equal(net_logits(model, picture), saved(picture)[0])


def test_a_missing_path_is_never_taken_for_a_hub_name():
    with pytest.raises(ModelError, match=r"no model 'smp-hub/segformer': expected a bundled model \(nuclei, street\)"):
        load_model("smp-hub/segformer")


@pytest.mark.parametrize("missing", ["config.json", "card.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=f"{missing}.* A model folder needs"):
        load_model(folder)


@pytest.mark.parametrize(
    "content, message", [("{", "expected a file of JSON"), ("[]", "expected a JSON object. Received: list")]
)
@pytest.mark.parametrize("file", ["config.json", "card.json"])
def test_json_that_is_none(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=f"{file}: {message}"):
        load_model(folder)


def test_weights_that_are_none(folder):
    (folder / "model.safetensors").write_bytes(b"no weights")
    change(folder / "card.json", sha256=hashlib.sha256(b"no weights").hexdigest())
    with pytest.raises(ModelError, match="do not make a net: SafetensorError"):
        load_model(folder)


def test_changed_weights_are_refused(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is not the file that card.json describes. Expected sha256"):
        load_model(folder)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"classes": ["a", "b"]}, "expected one channel for each of 2 classes, .* Received: head softmax, 3 channels"),
        ({"classes": "abc"}, "card.json: classes: expected 2 to 255 different names. Received: 'abc'"),
        ({"classes": ["a", "a", "b"]}, "2 to 255 different names"),
        ({"classes": None}, "'classes' is missing"),
        ({"colours": [[0, 0, 0]]}, "colours: expected 3 triples of 0 to 255. Received: .*"),
        ({"colours": [[0, 0, 300]] * 3}, "colours: expected 3 triples of 0 to 255"),
        ({"colours": [[0, 0, 0.5]] * 3}, "colours: expected 3 triples of 0 to 255"),
        ({"mean": [0.5]}, "mean: expected three numbers from 0 to 1, of RGB/255. Received: .0.5."),
        ({"mean": [123, 117, 104]}, "mean: expected three numbers from 0 to 1, of RGB/255"),
        ({"mean": 0.5}, "mean: expected three numbers"),
        ({"std": [0, 0, 0]}, "std: expected three numbers above 0"),
        ({"frame": "360x480"}, r"frame: expected null, or .height, width.. Received: '360x480'"),
        ({"frame": [0, 0]}, "frame: expected null"),
        ({"frame": [360]}, "frame: expected null"),
        ({"divisor": 0}, "divisor: expected a whole number from 1 to 1024. Received: 0"),
        ({"divisor": -32}, "divisor: expected a whole number"),
        ({"head": "tanh"}, "head: expected softmax or sigmoid. Received: 'tanh'"),
        ({"dropout": "x"}, "dropout: expected a list of"),
        ({"dropout": [{"p": 0.1}]}, "dropout: expected a list of"),
        ({"dropout": [{"before": "head", "p": 0.1}]}, "expected a submodule's name and 0 < p < 1. Received: 'head'"),
        ({"dropout": [{"before": "segmentation_head", "p": 0.0}]}, "0 < p < 1. Received: 'segmentation_head', p = 0.0"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(folder, entries, message):
    change(folder / "card.json", **entries)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_a_card_without_a_name_is_refused(folder):
    card = json.loads((folder / "card.json").read_text())
    del card["name"]
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="'name' is missing"):
        load_model(folder)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"_model_class": "os.system"}, "expected _model_class one of .*Unet.* Received: 'os.system'"),
        ({"activation": "softmax"}, "expected activation null, .* Received: 'softmax'"),
        ({"encoder_name": "resnet1"}, "config.json and model.safetensors do not make a net: KeyError"),
        ({"decoder_channels": [16, 8, 4]}, "do not make a net: RuntimeError: .*size mismatch"),
        ({"in_channels": 4}, "do not make a net: RuntimeError: .*size mismatch"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, entries, message):
    change(folder / "config.json", **entries)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_a_sigmoid_head_becomes_two_classes_only_when_said():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 1, 3, padding=1)
    with pytest.raises(ModelError, match='1 channel for 2 classes. If that is a sigmoid head, say head="sigmoid"'):
        wrap_model(net, ["back", "front"])
    model = wrap_model(net, ["back", "front"], head="sigmoid")
    picture = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        probabilities, front = net_logits(model, picture).softmax(0), net(picture)[0, 0].sigmoid()
    torch.testing.assert_close(probabilities[1], front)
    torch.testing.assert_close(probabilities[0], 1 - front)


class Gives(nn.Module):
    """A net that gives what a function makes of three-channel features."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 1), function

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: x.softmax(1), "gives values from 0 to 1, which are probabilities. Expected logits"),
        (lambda x: x.sigmoid(), "gives values from 0 to 1, which are probabilities. Expected logits"),
        (lambda x: x / 0, "values that are not finite"),
        (lambda x: (x, x), r"expected logits of shape \(1, C, h, w\). Received: tuple"),
        (lambda x: x.mean((2, 3)), r"Received: a tensor of shape \(1, 3\)"),
    ],
)
def test_outputs_that_are_not_logits_are_refused(function, message):
    with pytest.raises(ModelError, match=message):
        wrap_model(Gives(function), ["a", "b", "c"])


def test_sigmoid_probabilities_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Sigmoid())
    with pytest.raises(ModelError, match="gives values from 0 to 1, which are probabilities"):
        wrap_model(net, ["back", "front"], head="sigmoid")


def test_dictionaries_and_coarse_logits_are_understood():
    pooled = wrap_model(Gives(lambda x: {"out": nn.functional.avg_pool2d(x, 4)}), ["a", "b", "c"])
    with torch.inference_mode():
        assert net_logits(pooled, torch.rand(1, 3, 64, 32)).shape == (3, 64, 32)


def test_wrapping_leaves_the_net_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout2d(0.5), nn.Conv2d(4, 2, 1)).train()
    net[1].eval()  # mixed flags, as after partial freezing
    before, flags = copy.deepcopy(net.state_dict()), [part.training for part in net.modules()]
    random = torch.get_rng_state()
    model = wrap_model(net, ["a", "b"])
    assert [part.training for part in net.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    with pytest.raises(ZeroDivisionError), evaluating(model.module):
        raise ZeroDivisionError
    assert [part.training for part in net.modules()] == flags


def test_inserted_dropout_acts_in_training_only_and_survives_a_copy():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    keys = list(net.state_dict())
    put_dropout(net, "1", 0.5)
    assert list(net.state_dict()) == keys
    twin, picture = copy.deepcopy(net), torch.rand(1, 3, 8, 8)
    for each in (net, twin):
        each.eval()
        assert torch.equal(each(picture), each(picture))
        each.train()
        assert not torch.equal(each(picture), each(picture))
    twin.eval()
    assert net.dropout_before_1.training, "the copy shares the original's dropout"


def test_model_of_a_bare_net_has_a_fingerprint():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
    assert wrap_model(first, ["a", "b"]).sha256 == wrap_model(copy.deepcopy(first), ["a", "b"]).sha256
    assert wrap_model(first, ["a", "b"]).sha256 != wrap_model(second, ["a", "b"]).sha256
    assert isinstance(wrap_model(first, ["a", "b"]), Model)


def test_load_net_needs_no_card(folder):
    (folder / "card.json").unlink()
    assert not load_net(folder).training


def test_unknown_device(folder):
    with pytest.raises(ModelError, match="device: expected auto, cpu or cuda. Received: 'tpu'"):
        load_model(folder, "tpu")
