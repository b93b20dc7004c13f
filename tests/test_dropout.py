"""Masks are torch's dropout, found wherever it is, and the net is left as it was."""

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F

from seguncert.dropout import Masks, functional_dropout, require_dropout, stochastic_modules
from seguncert.model import ModelError, put_dropout, wrap_model

KINDS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class Net(nn.Module):
    """A small net with `middle` between two convolutions."""

    def __init__(self, middle, C=2):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 16, 3, padding=1), middle, nn.Conv2d(16, C, 1)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3, self.training)


def wrap(net, C=2):
    return wrap_model(net.eval(), [str(c) for c in range(C)], name="net", divisor=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_mask_does_what_torch_does_with_the_same_random_numbers(kind, inplace, monkeypatch):
    shape = (1, 6, 8) if kind is nn.Dropout1d else (1, 6, 8, 5, 3) if kind is nn.Dropout3d else (1, 6, 8, 5)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    module = kind(0.4, inplace=inplace).train()
    torch.manual_seed(5)
    expected = module(value.clone())
    torch.manual_seed(5)
    monkeypatch.setattr(Masks, "_keep", lambda self, sample, p, kept, shape, _: kept * torch.empty(shape).bernoulli_(p))
    kept = value.clone()
    received = Masks(0, [0]).apply(module, value)
    torch.testing.assert_close(received, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(value, kept), "in place on the caller's tensor"


@pytest.mark.parametrize("kind", KINDS)
def test_masks_keep_the_mean_and_have_the_right_spread(kind):
    shape = (1, 400, 5) if kind is nn.Dropout1d else (1, 400, 5, 5, 5) if kind is nn.Dropout3d else (1, 400, 5, 5)
    module, value = kind(0.25), torch.ones(shape)
    drawn = torch.cat([Masks(3, [sample]).apply(module, value) for sample in range(50)])
    if "Alpha" in kind.__name__:
        value = torch.randn(shape)  # alpha dropout keeps mean 0 and variance 1
        drawn = torch.cat([Masks(3, [sample]).apply(module, value) for sample in range(50)])
        assert abs(drawn.mean()) < 0.03 and abs(drawn.var() - 1) < 0.05
    else:
        assert sorted(drawn.unique().tolist()) == [0.0, pytest.approx(1 / 0.75)]
        assert drawn.mean() == pytest.approx(1, abs=0.02)
        if kind is not nn.Dropout:
            whole = drawn.flatten(2)
            assert (whole == whole[..., :1]).all(), "a channel is dropped whole"


def test_masks_are_a_function_of_seed_sample_and_call():
    module, value = nn.Dropout(0.5), torch.ones(1, 4, 50)

    def draw(seed, sample):
        masks = Masks(seed, [sample])
        return [masks.apply(module, value) for _ in range(2)]

    first, second = draw(0, 0)
    assert torch.equal(draw(0, 0)[0], first) and torch.equal(draw(0, 0)[1], second)
    assert not torch.equal(first, second)
    assert not torch.equal(draw(0, 1)[0], first) and not torch.equal(draw(1, 0)[0], first)


def test_a_batch_of_samples_has_the_masks_of_each():
    module, value = nn.Dropout2d(0.5), torch.randn(1, 40, 3, 3)
    together = Masks(7, range(4)).apply(module, value)
    assert together.shape == (4, 40, 3, 3)
    assert torch.equal(together, torch.cat([Masks(7, [k]).apply(module, value) for k in range(4)]))


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_each_row_of_a_batch_has_a_mask_of_its_own(kind):
    drawn = Masks(0, [0]).apply(kind(0.5), torch.ones(5, 40, 2, 2))  # windows or tokens in the first dimension
    assert len({row.numpy().tobytes() for row in drawn}) == 5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_piece_has_the_masks_of_its_place(layout):
    value = torch.ones(1, 6, 24, 40).contiguous(memory_format=layout)  # a net of stride 4
    whole, piece = Masks(2, [3], frame=(96, 160)), Masks(2, [3], origin=(32, 64), frame=(64, 96))
    for _ in range(2):
        drawn = whole.apply(nn.Dropout(0.4), value)
        assert torch.equal(piece.apply(nn.Dropout(0.4), value[:, :, 8:, 16:]), drawn[:, :, 8:, 16:])
    assert not piece.unplaced
    piece.apply(nn.Dropout(0.4), torch.ones(1, 16 * 24, 5))  # tokens
    assert piece.unplaced


def test_torch_is_not_asked_for_random_numbers():
    model, state = wrap(Net(Functional())), torch.random.get_rng_state()
    Masks(0, [0]).apply(nn.Dropout(0.5), torch.ones(1, 3))
    functional_dropout(model)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_found(kind):
    assert list(stochastic_modules(Net(kind(0.1)))) == ["middle"]
    assert not stochastic_modules(Net(kind(0.0)))


def test_stochastic_depth_is_an_option():
    net = Net(DropPath(0.1))
    assert not stochastic_modules(net) and list(stochastic_modules(net, drop_path=True)) == ["middle"]
    drawn = Masks(0, range(200)).apply(net.middle, torch.ones(1, 2, 3, 3)).flatten(1)
    assert (drawn == drawn[:, :1]).all() and 5 < (drawn[:, 0] == 0).sum() < 40


@pytest.mark.parametrize(
    "middle, reason",
    [
        (nn.ReLU(), "it has no dropout. Put"),
        (nn.Dropout2d(0.0), r"its dropout has p = 0 \(middle\)"),
        (DropPath(0.1), r"stochastic depth \(middle\) is not taken for dropout"),
        (Functional(), "middle call dropout as a function"),
    ],
)
def test_without_dropout_the_choices_are_named(middle, reason):
    with pytest.raises(ModelError, match=f"net: mc-dropout would give the same.*{reason}") as caught:
        require_dropout(wrap(Net(middle)))
    assert "insert-dropout PLACE:P (places: first, last), or use the method none" in str(caught.value)


def test_looking_for_functional_dropout_leaves_the_net_as_it_was():
    net = Net(nn.Sequential(nn.BatchNorm2d(16), Functional()))
    net.first.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    assert functional_dropout(wrap_model(net, ["0", "1"], divisor=4)) == ["middle.1"]
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_inserted_dropout_is_found():
    net = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=3)
    assert not stochastic_modules(net)
    put_dropout(net, "segmentation_head", 0.2)
    assert list(stochastic_modules(net)) == ["dropout_before_segmentation_head"]
