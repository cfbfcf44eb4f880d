"""The audit: spike-driven networks pass, and networks that cheat are named."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from qsd import QsdError, audit_spike_driven, measure_energy, to_spike_driven
from qsd.layers import QuantConv2d, QuantLinear, conv_norm
from qsd.neurons import SpikeNeuron
from tests.helpers.networks import NAMES, dense_network, sampled

IMAGES = torch.randn(2, 3, 32, 48, dtype=torch.float64)


def by_name(audit):
    return {operation.name: operation for operation in audit.operations}


@pytest.mark.parametrize("name", sampled([name for name in NAMES if name.startswith("qsd")]))
def test_every_merged_variant_is_spike_driven_behind_its_stem(name):
    spiking = to_spike_driven(dense_network(name))
    audit = audit_spike_driven(spiking, IMAGES)
    audit.check()
    assert audit.spike_driven
    found = by_name(audit)
    assert [o.name for o in audit.operations if o.stem] == ["stem.downsample.proj"]
    products = {n: o for n, o in found.items() if o.operation == "product"}
    assert set(products) == {f"{n}.{p}" for n in attentions(spiking) for p in ("key_value", "query")}
    assert all(o.status == "binary" for n, o in found.items() if n not in products and not o.stem)
    # every convolution and linear layer of the network was seen: one for each synapse
    assert len(found) == len(products) + sum(
        type(m).__name__ in ("SpikingChain", "SpikingDense") for m in spiking.modules()
    )


def attentions(spiking):
    return [name for name, m in spiking.network.named_modules() if type(m).__name__ == "SpikeDrivenSelfAttention"]


def test_the_width_of_the_attention_s_matrix_is_what_was_seen():
    # all query, key and value neurons saturated: on 2 x 2 tokens M = N T^2 = 4 * 16, 7 bits; running sums to T, 3 bits
    model = dense_network(depth=2)
    for name, module in model.named_modules():
        if name.endswith(("q_proj.norm2", "k_proj.norm2", "v_proj.norm2")):
            module.bias.data.fill_(100.0)
    found = by_name(audit_spike_driven(to_spike_driven(model), torch.randn(1, 3, 32, 32, dtype=torch.float64)))
    product, query = (found[f"stages.2.blocks.0.attn.{name}"] for name in ("key_value", "query"))
    assert (product.status, product.bits) == ("integer", 3)
    assert (query.status, query.bits) == ("integer", (4 * 4**2).bit_length()) == ("integer", 7)


@pytest.mark.parametrize(
    ("merge", "analog"),
    [
        (False, ("q_proj.depthwise", "q_proj.pointwise2", "reduce.pointwise")),
        ("rep", ("reduce.pointwise",)),
        ("sep", ("q_proj.depthwise", "q_proj.pointwise2")),
    ],
)
def test_inner_layers_of_unmerged_chains_are_named_as_analog(merge, analog):
    audit = audit_spike_driven(to_spike_driven(dense_network(), merge=merge), IMAGES)
    named = [o.name for o in audit.operations if o.status == "analog" and not o.stem]
    assert all(any(n.endswith(end) for n in named) for end in analog)
    assert all(n.endswith((".depthwise", ".pointwise", ".pointwise2")) for n in named)
    with pytest.raises(QsdError, match=r"are not spike-driven: .*an inner layer of a chain.*merge='all'"):
        audit.check()


# -- networks that cheat ----------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Stem, neuron, convolution, neuron, head; a trick somewhere."""

    def __init__(self, before=lambda x: x, between=lambda x: x):
        super().__init__()
        self.first, self.neuron = conv_norm(3, 4, 3), SpikeNeuron(4)
        self.second, self.last, self.head = QuantConv2d(4, 4, 3, padding=1), SpikeNeuron(4, 0.01), QuantLinear(4, 2)
        self.before, self.between = before, between

    def forward(self, x):
        x = self.neuron(self.before(self.first(x)))
        x = self.second(self.between(x))
        return self.head(self.last(x.mean((2, 3))))


def converted(**tricks):
    return to_spike_driven(Network(**tricks).double().eval())


def test_an_honest_small_network_passes():
    audit = audit_spike_driven(converted(), IMAGES)
    audit.check()
    assert [(o.name, o.status) for o in audit.operations] == [
        ("first", "analog"), ("second", "binary"), ("head", "binary"),
    ]  # fmt: skip


class FunctionalReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.neuron = conv_norm(3, 4, 3), conv_norm(4, 4, 3), SpikeNeuron(4)

    def forward(self, x):
        return self.neuron(self.second(F.relu(self.first(x))))


def test_a_functional_relu_is_found_though_the_counts_are_right():
    # behind the stem, whose current is the same in every step, a ReLU passes the conversion's comparison of counts
    audit = audit_spike_driven(to_spike_driven(FunctionalReLU().double().eval()), IMAGES)
    with pytest.raises(QsdError, match=r"the model \(relu\) \(other\): relu of values that are no spikes; second"):
        audit.check()
    assert by_name(audit)["second"].status == "analog"


def test_a_scaled_spike_is_found():
    audit = audit_spike_driven(converted(between=lambda x: 1.5 * x), IMAGES)
    with pytest.raises(QsdError, match=r"second \(convolution\): scaled spikes, of 0\.375 each"):
        audit.check()


def test_a_value_that_is_carried_beside_spikes_is_found():
    spiking = converted()
    spiking.network.between = lambda x: x + 0.25 * x.roll(1, -1)  # tampered with after the conversion
    second = by_name(audit_spike_driven(spiking, IMAGES))["second"]
    assert (second.status, second.note) == ("analog", "its input is analog")
    spiking.network.between = lambda x: x + x.roll(1, -1)
    second = by_name(audit_spike_driven(spiking, IMAGES))["second"]
    assert (second.status, second.bits, second.spike_driven) == ("integer", 2, False)


@pytest.mark.parametrize(
    ("trick", "note"),
    [
        (lambda x: (x + x.roll(1, -1)) * (x + x.roll(1, -2)), "2-bit integer times 2-bit integer"),
        (lambda x: x * x.mean(), "a binary operand times an analog one"),
        (lambda x: torch.einsum("bchw,bdhw->bcdw", x + 0.5, x + 0.5), "analog times analog"),
        (lambda x: (x + x) @ (x + x).transpose(-1, -2), "2-bit integer times 2-bit integer"),
    ],
    ids=["gate", "mean", "einsum", "matmul"],
)
def test_a_product_inside_a_forward_is_found(trick, note):
    spiking = converted()
    spiking.network.between = lambda x: trick(x)[:, :4, :32, :32]
    audit = audit_spike_driven(spiking, IMAGES[..., :32])
    assert any(o.operation == "product" and o.note == note for o in audit.operations), audit.operations
    with pytest.raises(QsdError, match="not spike-driven"):
        audit.check()


def test_gating_an_integer_by_spikes_inside_a_forward_passes():
    spiking = converted()
    spiking.network.between = lambda x: x * (x.roll(1, -1) > 0)
    audit = audit_spike_driven(spiking, IMAGES)
    product = next(o for o in audit.operations if o.operation == "product")
    assert product.spike_driven


@pytest.mark.parametrize("function", [torch.sigmoid, lambda x: x.softmax(-1), lambda x: 1 / (1 + x), torch.round])
def test_what_bends_a_current_is_found(function):
    spiking = converted()
    spiking.network.before = function
    audit = audit_spike_driven(spiking, IMAGES)
    assert any(o.operation == "other" and o.status == "analog" for o in audit.operations)
    assert not audit.spike_driven


def test_weights_that_meet_currents_by_element_are_found():
    scales = torch.rand(4, 1, 1, dtype=torch.float64)
    spiking = converted()
    spiking.network.before = lambda x: x * scales
    found = audit_spike_driven(spiking, IMAGES)
    assert any(o.name == "the model (mul)" and o.status == "analog" for o in found.operations)


def test_an_operation_without_a_spike_is_unproven():
    model = Network().double().eval()
    model.first.norm.bias.data.fill_(-100.0)
    spiking = to_spike_driven(model)
    audit = audit_spike_driven(spiking, IMAGES)
    assert by_name(audit)["second"].status == "unproven"
    with pytest.raises(QsdError, match=r"2 operations saw no spike on 2 images.*second, head; audit with more"):
        audit.check()


def test_preprocessing_of_images_belongs_to_the_stem():
    class Normalising(Network):
        def forward(self, x):
            return super().forward((x - x.new_tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / x.new_tensor(0.2))

    audit = audit_spike_driven(to_spike_driven(Normalising().double().eval()), [(IMAGES[:1], None), (IMAGES[1:], None)])
    audit.check()
    assert audit.images == 2
    assert by_name(audit)["first"].stem


def test_nothing_to_audit_on_is_an_error():
    with pytest.raises(QsdError, match="there are no images"):
        audit_spike_driven(converted(), [])
    with pytest.raises(QsdError, match="a batch begins with a str"):
        audit_spike_driven(converted(), ["image"])


def test_findings_are_data_and_a_table():
    audit = audit_spike_driven(converted(), IMAGES, max_images=1)
    data = audit.to_dict()
    assert data["images"] == 1
    assert data["operations"][0] == {
        "name": "first", "operation": "convolution", "status": "analog", "bits": None, "stem": True, "note": "",
        "shift": 0,
        "spike_driven": False,
    }  # fmt: skip
    assert audit.table().row_count == 3


def test_names_that_look_like_markup_are_printed_as_they_are():
    spiking = converted()
    audit = audit_spike_driven(spiking, IMAGES)
    audit.operations[0].note = audit.operations[0].name = "[/x]"
    energy = measure_energy(spiking, IMAGES, progress=False)
    energy.layers[0].name = "[/x]"
    for table in (audit.table(), energy.table()):
        console = Console(width=300, record=True, file=io.StringIO())
        console.print(table)
        assert "[/x]" in console.export_text()
