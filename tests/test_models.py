"""The nets: the lesson's structure, and the same parameters fused or plain."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.measure.error import exact_logits, relative_error
from resnet_fused.measure.networks import plain_net, random_images
from resnet_fused.reference import Bottleneck, Residual

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
PLAIN = dict.fromkeys(NAMES[:2], Residual) | dict.fromkeys(NAMES[2:], Bottleneck)
FUSED = dict.fromkeys(NAMES[:2], rf.FusedResidual) | dict.fromkeys(NAMES[2:], rf.FusedBottleneck)


def build(name, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return getattr(rf.models, name)(*args, **kwargs)


class LessonResidual(nn.Module):
    """The block as the lesson prints it."""

    def __init__(self, input_channels, num_channels, use_1x1conv=False, strides=1):
        super().__init__()
        self.conv1 = nn.Conv2d(
            input_channels, num_channels, kernel_size=3, padding=1, stride=strides
        )
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        if use_1x1conv:
            self.conv3 = nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides)
        else:
            self.conv3 = None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, X):
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


def lesson_block(input_channels, num_channels, num_residuals, first_block=False):
    blk = []
    for i in range(num_residuals):
        if i == 0 and not first_block:
            blk.append(LessonResidual(input_channels, num_channels, use_1x1conv=True, strides=2))
        else:
            blk.append(LessonResidual(num_channels, num_channels))
    return blk


def lesson_net():
    b1 = nn.Sequential(
        nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    b2 = nn.Sequential(*lesson_block(64, 64, 2, first_block=True))
    b3 = nn.Sequential(*lesson_block(64, 128, 2))
    b4 = nn.Sequential(*lesson_block(128, 256, 2))
    b5 = nn.Sequential(*lesson_block(256, 512, 2))
    return nn.Sequential(
        b1, b2, b3, b4, b5, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(512, 10)
    )


def test_resnet18_is_the_lessons_net():
    torch.manual_seed(3)
    lesson = lesson_net()
    ours = build("resnet18", 10, 1, block=Residual, seed=3)
    want, got = lesson.state_dict(), ours.state_dict()
    assert list(want) == list(got)
    for key in want:
        assert torch.equal(want[key], got[key]), key
    x = torch.randn(2, 1, 96, 96)
    for mode in (True, False):
        assert torch.equal(lesson.train(mode)(x), ours.train(mode)(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_fused_net_starts_from_the_plain_nets_parameters(name):
    plain = build(name, 7, block=PLAIN[name], seed=5)
    fused = build(name, 7, seed=5)
    want, got = plain.state_dict(), fused.state_dict()
    assert list(want) == list(got)
    for key in want:
        assert torch.equal(want[key], got[key]), key
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in fused.named_parameters()]


@pytest.mark.parametrize(("name", "convs"), list(zip(NAMES, (20, 36, 53, 104, 155), strict=True)))
def test_depth_and_sizes(name, convs):
    """Layers as many as the name says (+ the shortcuts' 3 or 4), 56-28-14-7 maps."""
    with torch.device("meta"):
        net = getattr(rf.models, name)(block=PLAIN[name])
        x = torch.empty(2, 3, 224, 224)
    shortcuts = 3 if PLAIN[name] is Residual else 4
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == convs
    assert convs - shortcuts + 1 == int(name.removeprefix("resnet"))
    sizes = []
    for child in net:
        x = child(x)
        sizes.append(tuple(x.shape[1:]))
    wide = 1 if PLAIN[name] is Residual else 4
    assert sizes[:5] == [
        (64, 56, 56),
        *((wide * 64 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)),
    ]
    assert tuple(x.shape) == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_every_convolution_of_the_fused_net_is_fused(name):
    net = getattr(rf.models, name)().eval()
    plain = [n for n, m in rf.unfuse(net).named_modules() if type(m) is PLAIN[name]]
    rows = list(rf.report(net))
    assert all(row.fused for row in rows), [row for row in rows if not row.fused]
    kinds = [row.kind for row in rows]
    block = "basic" if PLAIN[name] is Residual else "bottleneck"
    assert kinds.count("conv_bn") == 1, "the stem"
    assert kinds.count(block) == len(plain) == len(rows) - 1


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_fused_net_computes_what_the_plain_net_computes(name):
    plain = plain_net(name, num_classes=11)
    fused = getattr(rf.models, name)(11).eval()
    fused.load_state_dict(plain.state_dict())
    x = random_images(2, size=64)
    exact = exact_logits(plain, x)
    with torch.inference_mode():
        limit = max(2 * relative_error(plain(x), exact), 2e-6)
        assert relative_error(fused(x), exact) <= limit


def test_custom_block_stays_eager():
    """A block class of the user's own is used as it is; nothing is fused behind their back."""

    class Mine(Residual):
        pass

    net = rf.models.resnet18(block=Mine)
    assert type(net[1][0]) is Mine
    assert type(net[0][0]) is nn.Conv2d


def test_subclass_of_the_fused_block_is_used():
    class Mine(rf.FusedResidual):
        pass

    net = rf.models.resnet18(block=Mine)
    assert type(net[1][0]) is Mine


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: rf.models.resnet18(0),
            ValueError,
            "resnet18: num_classes must be at least 1, got 0",
        ),
        (
            lambda: rf.models.resnet34(10, -3),
            ValueError,
            "resnet34: in_channels must be at least 1, got -3",
        ),
        (
            lambda: rf.models.resnet50("10"),
            TypeError,
            "resnet50: num_classes must be an int, got str",
        ),
        (
            lambda: rf.models.resnet18(True),
            TypeError,
            "resnet18: num_classes must be an int, got bool",
        ),
        (
            lambda: rf.models.resnet18(block=Residual(64, 64)),
            TypeError,
            "resnet18: block must be a block class such as FusedResidual or reference.Residual, "
            "got an instance of Residual",
        ),
        (
            lambda: rf.models.resnet50(block=None),
            TypeError,
            "resnet50: block must be a block class such as FusedBottleneck or "
            "reference.Bottleneck, got an instance of NoneType",
        ),
        (
            lambda: rf.models.resnet50(block=Residual),
            ValueError,
            "resnet50: block must have 4 * num_channels output channels such as FusedBottleneck or "
            "reference.Bottleneck, got Residual with 1 * num_channels",
        ),
        (
            lambda: rf.models.resnet18(block=rf.FusedBottleneck),
            ValueError,
            "resnet18: block must have num_channels output channels such as FusedResidual or "
            "reference.Residual, got FusedBottleneck with 4 * num_channels",
        ),
        (
            lambda: rf.models.resnet101(block=rf.FusedResidual),
            ValueError,
            "resnet101: block must have 4 * num_channels output channels such as FusedBottleneck "
            "or reference.Bottleneck, got FusedResidual with 1 * num_channels",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
