"""The forty models: how each is built, and the shape of an input.

All have random weights, and come from the constructors of their libraries. Images, widths and
depths are small, so that a model takes seconds on two cores; the architecture is the published
one. A language model is called with embeddings, since the input Jacobian is one with respect to
them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Published:
    """A model: ``build(library)`` makes it, ``shape`` is that of a sample."""

    name: str
    library: str
    build: Callable[[Any], nn.Module]
    shape: tuple[int, ...]
    batch: int = 4

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build(importlib.import_module(self.library)).train()

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, *self.shape, generator=generator, dtype=dtype)


class Siren(nn.Sequential):
    """The network of Sitzmann et al. 2020 (arXiv 2006.09661): ``sin(30 (W x + b))``."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        sizes = [2, *[width] * layers]
        super().__init__(*map(SirenLayer, sizes[:-1], sizes[1:]), nn.Linear(width, 3))


class SirenLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if inputs == 2 else (6 / inputs) ** 0.5 / 30
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * self.linear(x))


class OfEmbeddings(nn.Module):
    """A model of transformers as a function of one tensor, to its last hidden state."""

    def __init__(self, model: nn.Module, argument: str = "inputs_embeds") -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.argument: x}).last_hidden_state


def _torchvision(name: str, size: int = 64, **options: Any) -> Published:
    def build(library: Any) -> nn.Module:
        return library.models.get_model(name, weights=None, num_classes=10, **options)

    return Published(name, "torchvision", build, (3, size, size))


def _timm(name: str, size: int = 64, *, sized: bool = False, **options: Any) -> Published:
    """``sized`` says that the constructor takes the size of the images."""
    if sized:
        options["img_size"] = size

    def build(library: Any) -> nn.Module:
        return library.create_model(name, pretrained=False, num_classes=10, **options)

    return Published(name, "timm", build, (3, size, size))


def _transformers(
    name: str,
    shape: tuple[int, ...],
    argument: str = "inputs_embeds",
    options: dict[str, Any] | None = None,
    **config: Any,
) -> Published:
    def build(library: Any) -> nn.Module:
        kind = name.removesuffix("Model").removesuffix("Encoder")
        made = getattr(library, name)(
            getattr(library, f"{kind}Config")(**config), **(options or {})
        )
        if name == "Wav2Vec2Model":  # else it requires a gradient of its input itself
            made.freeze_feature_encoder()
        return OfEmbeddings(made, argument)

    return Published(name, "transformers", build, shape)


def _resnext(library: Any) -> nn.Module:
    block = library.models.resnet.Bottleneck
    return library.models.ResNet(block, [2] * 4, 10, groups=32, width_per_group=4)


def _convnext(library: Any) -> nn.Module:
    stage = library.models.convnext.CNBlockConfig
    stages = [stage(48, 96, 2), stage(96, 192, 2), stage(192, 384, 4), stage(384, None, 2)]
    return library.models.ConvNeXt(stages, num_classes=10)


def _vit(library: Any) -> nn.Module:
    return library.models.VisionTransformer(64, 8, 4, 4, 128, 512, num_classes=10)


def _swin(library: Any) -> nn.Module:
    return library.models.SwinTransformer([4, 4], 48, [2, 2, 2], [3, 6, 12], [4, 4], num_classes=10)


BERT = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 1000,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "use_cache": False}

MODELS: tuple[Published, ...] = (
    _torchvision("resnet18"),
    Published("resnext26_32x4d", "torchvision", _resnext, (3, 64, 64)),
    _torchvision("densenet121"),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("efficientnet_b0"),
    _torchvision("regnet_y_400mf"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("squeezenet1_1"),
    _torchvision("googlenet", aux_logits=False, init_weights=False),
    _torchvision("mnasnet0_5"),
    Published("ConvNeXt", "torchvision", _convnext, (3, 64, 64)),
    Published("VisionTransformer", "torchvision", _vit, (3, 64, 64)),
    Published("SwinTransformer", "torchvision", _swin, (3, 64, 64)),
    _timm("edgenext_xx_small"),
    _timm("resnet26d"),
    _timm("resnetv2_18d"),
    _timm("nf_regnet_b0"),
    _timm("convnext_atto"),
    _timm("convnextv2_atto"),
    _timm("mobilenetv4_conv_small"),
    _timm("regnety_002"),
    _timm("ghostnet_100"),
    _timm("poolformer_s12"),
    _timm("vit_tiny_patch16_224", sized=True),
    _timm("mixer_s16_224", sized=True),
    _timm("gmlp_ti16_224", sized=True),
    _timm("eva02_tiny_patch14_224", 70, sized=True),
    _timm("levit_128s", 128, sized=True),
    _transformers("BertModel", (64, 256), options={"add_pooling_layer": False}, **BERT),
    _transformers("DistilBertModel", (64, 256), dim=256, hidden_dim=1024, n_layers=4, n_heads=4),
    _transformers("GPT2Model", (64, 256), n_embd=256, n_layer=4, n_head=4, use_cache=False),
    _transformers("OPTModel", (64, 256), **BERT, ffn_dim=1024, word_embed_proj_dim=256),
    _transformers("LlamaModel", (64, 256), **LLAMA),
    _transformers("Qwen2Model", (64, 256), **LLAMA),
    _transformers("GemmaModel", (64, 256), **LLAMA, head_dim=64),
    _transformers(
        "T5EncoderModel", (64, 256), d_model=256, d_ff=1024, d_kv=64, num_heads=4, num_layers=4
    ),
    _transformers(
        "CLIPVisionModel", (3, 64, 64), "pixel_values", **BERT, image_size=64, patch_size=8
    ),
    _transformers(
        "Wav2Vec2Model",
        (8000,),
        "input_values",
        **BERT,
        conv_dim=(128,) * 7,
        layerdrop=0.0,  # whether a layer runs is then no longer drawn anew in each step
        apply_spec_augment=False,
    ),
    Published("SIREN", "torch", lambda library: Siren(), (2,), batch=1024),
)
