"""What is settled is computed once, bit for bit as in full passes, and the net is left as it was."""

import threading

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import nn

from seguncert.dropout import Masks, require_dropout
from seguncert.model import ModelError, evaluating, load_model, net_logits, put_dropout, wrap_model
from seguncert.prefix import Session, in_session, intercepting, make_plan


class InPlace(nn.Module):
    """Skips, in-place ReLU before and after the cut, in-place dropout on what another branch still needs."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        self.drop, self.side, self.last = nn.Dropout2d(0.4, inplace=True), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 3, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.relu(self.norm(self.stem(x)))
        dropped = self.drop(x)
        dropped += self.side(dropped)
        return {"out": self.last(self.relu(dropped))}


class WritesLater(nn.Module):
    """Writes into a settled result after the dropout."""

    def __init__(self):
        super().__init__()
        self.stem, self.drop, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.3), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.drop(x)
        x += y
        return self.last(x)


class CountsCalls(nn.Module):
    """Gives other numbers each time: what must not be kept."""

    def __init__(self):
        super().__init__()
        self.stem, self.drop, self.last = nn.Conv2d(3, 8, 1), nn.Dropout(0.3), nn.Conv2d(8, 3, 1)
        self.count = 0

    def forward(self, x):
        self.count += 1
        return self.last(self.drop(self.stem(x) * self.count))


class Random(CountsCalls):
    def forward(self, x):
        x = self.stem(x)
        return self.last(self.drop(x + torch.rand_like(x)))


class Beside(CountsCalls):
    def forward(self, x):
        x = self.stem(x)
        self.drop(x)
        return self.last(x)


class Shared(nn.Module):
    """One block called before the dropout inside a settled module, before it by itself, and after it."""

    def __init__(self):
        super().__init__()
        self.block, self.drop, self.last = nn.Conv2d(8, 8, 1), nn.Dropout2d(0.3), nn.Conv2d(8, 3, 1)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1), self.block, nn.ReLU())

    def forward(self, x):
        return self.last(self.block(self.drop(self.block(self.first(x)))))


def unet():
    net = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=3)
    put_dropout(net, "decoder.blocks.1", 0.3)
    put_dropout(net, "segmentation_head", 0.2)
    return net


def segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_labels=3, depths=[1, 1, 1, 1], hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2
    )
    return SegformerForSemanticSegmentation(config)


NETS = {
    "fpn": lambda: smp.FPN("resnet18", encoder_weights=None, classes=3),
    "unet": unet,
    "deeplab": lambda: smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=3),
    "torchvision": lambda: torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ),
    "segformer": segformer,
    "in place": InPlace,
    "writes later": WritesLater,
    "shared": Shared,
}


def wrap(net):
    return wrap_model(net, ["a", "b", "c"], name="net")


def passes(model, plan, value, full, samples=3):
    session, found = Session(plan), []
    with torch.inference_mode(), evaluating(model.module), intercepting(model.module, plan.names):
        for sample in range(samples):
            session.begin(Masks(1, [sample]), full)
            with in_session(session):
                found.append(net_logits(model, value).clone())
    return torch.stack(found)


@pytest.mark.parametrize("name", NETS)
def test_bit_for_bit_as_full_passes(name):
    torch.manual_seed(0)
    model = wrap(NETS[name]())
    for module in model.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
    plan = make_plan(model, set(require_dropout(model)))
    assert plan.settled and not plan.note
    value = torch.randn(1, 3, 96, 128)
    shared, full = passes(model, plan, value, False), passes(model, plan, value, True)
    assert torch.equal(shared, full)
    assert not torch.equal(full[0], full[1]), "samples differ"


def test_a_plan_can_be_made_in_inference_mode():
    torch.manual_seed(0)
    with torch.inference_mode():
        assert make_plan(wrap(InPlace()), {"drop"}).settled


def test_no_dropout_is_applied_outside_a_session():
    torch.manual_seed(0)
    model, value = wrap(InPlace()), torch.randn(1, 3, 64, 64)
    plan = make_plan(model, {"drop"})
    with torch.inference_mode(), evaluating(model.module):
        expected = net_logits(model, value)
        with intercepting(model.module, plan.names):
            assert torch.equal(net_logits(model, value), expected)


def test_what_is_settled_is_not_computed_again():
    torch.manual_seed(0)
    model = wrap(NETS["deeplab"]())
    plan = make_plan(model, set(require_dropout(model)))
    names = {name for name, _ in plan.settled}
    assert {"encoder", "decoder.block1"} <= names, "also a branch that runs after the dropout"
    calls = []
    inner = next(m for m in model.module.encoder.modules() if isinstance(m, nn.Conv2d))
    hook = inner.register_forward_hook(lambda *_: calls.append(1))
    passes(model, plan, torch.randn(1, 3, 64, 64), False, samples=5)
    hook.remove()
    assert len(calls) == 1


def test_a_result_that_is_written_into_is_copied():
    torch.manual_seed(0)
    assert make_plan(wrap(WritesLater()), {"drop"}).copied == {("stem", 0)}


@pytest.mark.parametrize(
    "net, message",
    [
        (Random, "the net draws random numbers even in eval mode"),
        (Beside, r"its stochastic modules \(drop\) are not on the way to its logits"),
    ],
)
def test_nets_whose_samples_would_mislead_are_refused(net, message):
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=message):
        make_plan(wrap(net()), {"drop"})


def test_where_exactness_cannot_be_shown_all_passes_are_full():
    torch.manual_seed(0)
    plan = make_plan(wrap(CountsCalls()), {"drop"})
    assert not plan.settled and plan.note.startswith("each sample is a full pass")


def state_of(net):
    return (
        [(name, value.clone()) for name, value in net.state_dict().items()],
        [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module))) for module in net.modules()],
        torch.random.get_rng_state(),
    )  # fmt: skip


def assert_state(net, before):
    after = state_of(net)
    assert all(
        name == other and torch.equal(value, kept)
        for (name, value), (other, kept) in zip(after[0], before[0], strict=True)
    )
    assert after[1] == before[1] and torch.equal(after[2], before[2])


@pytest.mark.parametrize("fails", [False, True])
def test_the_net_is_left_as_it_was(fails):
    torch.manual_seed(0)
    net = unet()
    net.encoder.train()
    model, value = wrap(net), torch.randn(1, 5 if fails else 3, 64, 64)
    before = state_of(net)
    plan = make_plan(model, set(require_dropout(model)))
    assert_state(net, before)
    if fails:
        with pytest.raises(RuntimeError):
            passes(model, plan, value, False)
    else:
        passes(model, plan, value, False)
    assert_state(net, before)


def test_an_own_forward_comes_back():
    net = InPlace()
    own = net.last.forward = lambda x: nn.Conv2d.forward(net.last, x)
    with intercepting(net, {"last"}), intercepting(net, {"last"}):
        assert net.last.forward is not own
    assert net.last.forward is own


def test_threads_have_sessions_of_their_own():
    torch.manual_seed(0)
    model = wrap(InPlace())
    plan = make_plan(model, {"drop"})
    values = [torch.randn(1, 3, 64, 64) for _ in range(4)]
    expected = [passes(model, plan, value, True, 8) for value in values]
    found = [None] * 4

    def run(k):
        found[k] = passes(model, plan, values[k], False, 8)

    threads = [threading.Thread(target=run, args=[k]) for k in range(4)]
    with evaluating(model.module):
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "forward" not in vars(model.module.drop)


def test_bit_for_bit_of_the_bundled_model():
    model = load_model("street", "cpu")
    plan = make_plan(model, set(require_dropout(model)))
    assert {name for name, _ in plan.settled} == {"encoder", "decoder"}
    value = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(passes(model, plan, value, False), passes(model, plan, value, True))
