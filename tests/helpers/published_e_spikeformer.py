"""The published large E-SpikeFormer as plain functions of its state dict, and state dicts under its names."""

import re

from torch.nn import functional as F

# Names of qsd and what the published code calls them, applied in this order.
_NAMES = (
    (r"^stem\.downsample\.", "downsample1_1."),
    (r"^stages\.0\.downsample\.", "downsample1_2."),
    (r"^stages\.([12])\.downsample\.", lambda m: f"downsample{int(m[1]) + 1}."),
    (r"^(downsample\w+)\.proj\.conv\.", r"\1.encode_conv."),
    (r"^(downsample\w+)\.proj\.norm\.", r"\1.encode_bn."),
    (r"^stem\.blocks\.0\.", "ConvBlock1_1.0."),
    (r"^stages\.0\.blocks\.0\.", "ConvBlock1_2.0."),
    (r"^stages\.1\.blocks\.(\d)\.", lambda m: f"ConvBlock2_{int(m[1]) + 1}.0."),
    (r"^stages\.2\.blocks\.", "block3."),
    (r"^(ConvBlock\w+)\.0\.mlp\.fc([12])\.conv\.", r"\1.0.conv\2.0.0."),
    (r"^(ConvBlock\w+)\.0\.mlp\.fc([12])\.norm\.", r"\1.0.conv\2.0.1."),
    (r"\.attn\.proj\.layer_scale\.gamma$", ".layer_scale1"),
    (r"\.mlp\.fc2\.layer_scale\.gamma$", ".layer_scale2"),
    (r"\.mlp\.fc([12])\.conv\.", r".mlp.fc\1_conv."),
    (r"\.mlp\.fc([12])\.norm\.", r".mlp.fc\1_bn."),
    (r"\.attn\.([qkv])_proj\.", r".attn.\1_conv."),
    (r"\.attn\.proj\.", ".attn.proj_conv."),
    (r"_conv\.pointwise([12])\.", r"_conv.0.conv\1.0."),
    (r"_conv\.norm([12])\.", r"_conv.0.conv\1.1."),
    (r"_conv\.norm3\.", "_conv.1."),
)


def published_state(model):
    """The state of a large E-SpikeFormer of qsd as the published code saves it."""
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        one_sided = name.startswith("block3") and tensor.dim() == 4
        state[name] = tensor.squeeze(-1) if one_sided else tensor
    return state


class PublishedLarge:
    """Logits of both heads ``[B, classes]``, written from the published code's description.

    Neurons give ``floor(clip(x, 0, D) + 1/2)``, over D but in front of the second head; the gradient passes straight
    through the rounding. Attention multiplies query, key and value over D, and the product by 1/8.
    """

    def __init__(self, state, num_heads, levels, training):
        self.state, self.heads, self.levels, self.training = state, num_heads, levels, training

    def __call__(self, x):
        x = self.pair("ConvBlock1_1", self.down("downsample1_1", x, first=True))
        x = self.pair("ConvBlock1_2", self.down("downsample1_2", x))
        x = self.pair("ConvBlock2_2", self.pair("ConvBlock2_1", self.down("downsample2", x)))
        x = self.down("downsample3", x).flatten(2)
        for i in range(len({name.split(".")[1] for name in self.state if name.startswith("block3.")})):
            x = x + self.state[f"block3.{i}.layer_scale1"][:, None] * self.attention(f"block3.{i}.attn", x)
            x = x + self.state[f"block3.{i}.layer_scale2"][:, None] * self.mlp(f"block3.{i}.mlp", x)
        mean = x.mean(-1)
        return self.linear("head", mean), self.linear("head_kd", self.fire(mean) * self.levels)

    def fire(self, x):
        clipped = x.clamp(0, self.levels)
        return (clipped + ((clipped + 0.5).floor() - clipped).detach()) / self.levels

    def norm(self, name, x):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (self.state[f"{name}.{key}"] for key in keys)
        return F.batch_norm(x, mean.detach().clone(), var.detach().clone(), weight, bias, self.training)

    def down(self, name, x, first=False):
        weight, bias = self.state[f"{name}.encode_conv.weight"], self.state[f"{name}.encode_conv.bias"]
        x = F.conv2d(x if first else self.fire(x), weight, bias, 2, weight.shape[-1] // 2)
        return self.norm(f"{name}.encode_bn", x)

    def pair(self, name, x):
        y = x
        for conv in ("conv1", "conv2"):
            weight, bias = self.state[f"{name}.0.{conv}.0.0.weight"], self.state[f"{name}.0.{conv}.0.0.bias"]
            y = self.norm(f"{name}.0.{conv}.0.1", F.conv2d(self.fire(y), weight, bias, padding=1))
        return x + y

    def rep(self, name, x):
        for conv in ("conv1", "conv2"):
            x = self.norm(f"{name}.0.{conv}.1", F.conv1d(x, self.state[f"{name}.0.{conv}.0.weight"]))
        return self.norm(f"{name}.1", x)

    def attention(self, name, x):
        spikes = self.fire(x)
        q, k, v = (self.fire(self.rep(f"{name}.{key}_conv", spikes)).unflatten(1, (self.heads, -1)).mT for key in "qkv")
        mixed = (q @ (k.mT @ v) * 0.125).mT.flatten(1, 2)
        return self.rep(f"{name}.proj_conv", self.fire(mixed))

    def mlp(self, name, x):
        for layer in ("fc1", "fc2"):
            weight, bias = self.state[f"{name}.{layer}_conv.weight"], self.state[f"{name}.{layer}_conv.bias"]
            x = self.norm(f"{name}.{layer}_bn", F.conv1d(self.fire(x), weight, bias))
        return x

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])
