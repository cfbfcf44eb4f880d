"""A neuron, a layer and a backbone family that are defined outside of the package, as a user would define them."""

import timm
import torch
from torch import nn
from torch.nn import functional as F

from qsd.layers import conv_norm
from qsd.layers.heads import TokenMeanLinear
from qsd.models.base import ImageClassifier
from qsd.models.variants import Family, register_family
from qsd.neurons import SpikeNeuron
from qsd.spiking import register_conversion
from qsd.spiking.layers import DelayedNeuron, SpikingLinear, synaptic_operations

# -- a neuron with another threshold rule -----------------------------------------------------------------------------


class DoublingNeuron(SpikeNeuron):
    """A neuron whose threshold doubles with every spike: it counts ``1, 3, 7, ...`` thresholds, up to T spikes.

    The first threshold ``theta`` is learned.
    """

    def __init__(self, time_steps=3, theta=0.15):
        super().__init__(time_steps)
        self.theta = nn.Parameter(torch.tensor(theta))

    @property
    def threshold(self):
        return float(self.theta.detach())

    @property
    def amplitude(self):
        return 1 / self.time_steps

    def drive(self, x):
        return torch.log2((x / self.theta + 1.5).clamp(min=1e-9)) - 0.5

    def counts(self, x):
        sums = (2.0 ** torch.arange(1, self.time_steps + 1) - 1).to(x)
        return sum((x + self.theta / 2 >= total * self.theta).to(x.dtype) for total in sums)

    def forward(self, x):
        smooth = self.drive(x).clamp(0, self.time_steps)
        return (smooth + (self.counts(x) - smooth).detach()) * self.amplitude


class SpikingDoublingNeuron(DelayedNeuron):
    """Its dynamics in time: a threshold for every neuron, which a spike doubles after it was subtracted."""

    def threshold_at(self, scale=1.0):
        return torch.tensor(self.threshold / scale, dtype=torch.float64)

    def fire(self, membrane, threshold, spikes):
        torch.ge(membrane, threshold, out=spikes)
        membrane.sub_(spikes * threshold)
        threshold.mul_(1 + spikes)

    def spike_counts(self, x, *scale):
        threshold = self.threshold_at(*scale)
        sums = (2.0 ** torch.arange(1, self.time_steps + 1, dtype=torch.float64) - 1) * threshold
        return sum((x + threshold / 2 >= total).to(x.dtype) for total in sums)


@register_conversion(DoublingNeuron)
def _doubling(module, name, conversion):
    return SpikingDoublingNeuron(module, name, conversion.delay(name), conversion.runtime)


# -- a layer with its own rule and cost -------------------------------------------------------------------------------


def blur(x, kernel):
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])


class Blur(nn.Module):
    """A depthwise convolution with the fixed binomial kernel ``[1, 2, 1]``, divided by 16."""

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", torch.outer(row, row) / 16)

    def forward(self, x):
        return blur(x, self.kernel)


class SpikingBlur(SpikingLinear):
    """The same for spikes. Its factors are powers of two, which are wired and need no memory."""

    def __init__(self, kernel, name, runtime):
        super().__init__(name, runtime)
        self.register_buffer("kernel", kernel)

    def linear_map(self, x, share):
        return blur(x, self.kernel)

    def absorb(self, amplitude):
        self.kernel.mul_(amplitude)

    def operations(self, inputs):
        (x,) = inputs.tensors
        channels, height, width = x.shape[1:]
        neighbours = F.conv2d(x.new_ones(1, 1, height, width), x.new_ones(1, 1, 3, 3), padding=1)[0, 0].double()
        return synaptic_operations(inputs, lambda network: neighbours, [9.0 * channels * height * width])

    def stored_bits(self, weight_bits, merged_bits):
        return 0.0


@register_conversion(Blur)
def _blur(module, name, conversion):
    return SpikingBlur(module.kernel, name, conversion.runtime)


# -- a family of backbones --------------------------------------------------------------------------------------------


class ToyBlock(nn.Module):
    """Residual: a blur of spikes, then a convolution of spikes."""

    def __init__(self, dim, time_steps, weight_bits):
        super().__init__()
        self.neuron1, self.blur = SpikeNeuron(time_steps, 0.3), Blur()
        self.neuron2, self.conv = DoublingNeuron(time_steps), conv_norm(dim, dim, 3, bits=weight_bits)

    def forward(self, x):
        return x + self.conv(self.neuron2(self.blur(self.neuron1(x))))


class ToyNet(ImageClassifier):
    """Stem, blocks, a neuron and a head that takes the mean."""

    features_name = "blocks"

    def __init__(
        self, dim=8, depth=2, num_classes=10, in_chans=3, time_steps=3, weight_bits=4, drop_rate=0.0,
        drop_path_rate=0.0, global_pool="avg",
    ):  # fmt: skip
        super().__init__(dim, num_classes, in_chans, time_steps, weight_bits, drop_rate, drop_path_rate, global_pool)
        self.total_stride = 2
        self.stem = conv_norm(in_chans, dim, 3, 2, bits=weight_bits)
        self.blocks = nn.ModuleList(ToyBlock(dim, time_steps, weight_bits) for _ in range(depth))
        self.head_neuron = SpikeNeuron(time_steps, 0.3)
        self.head = self.build_head(num_classes)
        self.feature_info = [{"num_chs": dim, "reduction": 2, "module": f"blocks.{i}"} for i in range(depth)]

    def build_head(self, num_classes):
        return TokenMeanLinear(self.num_features, num_classes, self.weight_bits)

    def forward_head(self, x, pre_logits=False):
        x = self.head_neuron(x)
        return x.mean((2, 3)) if pre_logits else self.head(x)


if not timm.is_model("toy_net"):
    register_family(
        Family(
            ToyNet,
            "Toy",
            {"toy_net": {"dim": 8}},
            {"weight_bits": None},
            lambda _arguments: {"url": "", "num_classes": 10, "input_size": (3, 16, 16), "classifier": "head"},
            "there are none.",
            (0, 1),
        )
    )


def neuron_network():
    """A network around the neuron."""
    return nn.Sequential(
        conv_norm(3, 6, 3), DoublingNeuron(), conv_norm(6, 8, 3), DoublingNeuron(), TokenMeanLinear(8, 10)
    )  # fmt: skip


def layer_network():
    """A network around the layer. The next threshold is no multiple of 1/48, so that no sum lies on a tie."""
    return nn.Sequential(
        conv_norm(3, 6, 3), SpikeNeuron(3), Blur(), SpikeNeuron(3, 0.107), conv_norm(6, 8, 3), SpikeNeuron(3),
        TokenMeanLinear(8, 10),
    )  # fmt: skip


def family_network():
    """A network of the family, by its registered name."""
    return timm.create_model("toy_net")
