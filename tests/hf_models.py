"""Small models of transformers with random weights and nothing at its neutral start."""

import torch
import transformers as hf

from shaken import shaken

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
WIDE = {"image_size": (32, 80), "patch_size": 16}
PYRAMID = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 32],
    "num_attention_heads": [1, 2, 2, 4],
}


def _vit(name, **more):
    return getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**{**VIT, **WIDE, **more}))


def _pvt_v2(**more):
    config = hf.PvtV2Config(image_size=128, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32], mlp_ratios=[2, 2, 2, 2],
                            num_attention_heads=[1, 2, 2, 4], **more)  # fmt: skip
    return hf.PvtV2Model(config)


def _cvt():
    return hf.CvtModel(hf.CvtConfig(embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3]))


def _segformer():
    config = hf.SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4],
                                decoder_hidden_size=16, num_labels=3)  # fmt: skip
    return hf.SegformerForSemanticSegmentation(config)


def _detr():
    backbone = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
                               out_features=["stage2"])  # fmt: skip
    config = hf.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
                           d_model=24, encoder_layers=2, decoder_layers=1, encoder_attention_heads=3, num_queries=5,
                           decoder_attention_heads=3, encoder_ffn_dim=32, decoder_ffn_dim=32)  # fmt: skip
    return hf.DetrModel(config)


def _rt_detr():
    backbone = hf.RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                                     layer_type="basic", out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    config = hf.RTDetrConfig(backbone_config=backbone, encoder_hidden_dim=24, encoder_in_channels=[8, 16, 16], d_model=24,
                             encoder_attention_heads=3, encoder_ffn_dim=32, decoder_in_channels=[24, 24, 24],
                             decoder_layers=1, decoder_attention_heads=3, decoder_ffn_dim=32, num_queries=5,
                             num_denoising=0)  # fmt: skip
    return hf.RTDetrModel(config)


# name: (adapter, modules that are exchanged, image size, how it is made)
GLOBAL = {
    "vit": ("transformers_vit", 2, (32, 80), lambda: _vit("ViT")),
    "deit": ("transformers_vit", 2, (32, 80), lambda: _vit("DeiT")),
    "dinov2": ("transformers_vit", 2, (32, 80), lambda: _vit("Dinov2", image_size=64)),
    "dinov2_registers": ("transformers_vit", 2, (32, 80), lambda: _vit("Dinov2WithRegisters", num_register_tokens=3, image_size=64)),
    "dinov3": ("transformers_vit", 2, (32, 80), lambda: _vit("DINOv3ViT", num_register_tokens=2, image_size=64)),
    "clip": ("transformers_vit", 2, (64, 64), lambda: _vit("CLIPVision", image_size=64)),
    "siglip": ("transformers_vit", 2, (64, 64), lambda: _vit("SiglipVision", image_size=64)),
    "segformer": ("pyramid", 4, (64, 96), _segformer),
    "pvt": ("pyramid", 4, (64, 64), lambda: hf.PvtModel(hf.PvtConfig(image_size=64, sequence_reduction_ratios=[4, 2, 2, 1], **PYRAMID))),
    "pvt_v2": ("pyramid", 4, (64, 96), _pvt_v2),
    "pvt_v2_linear": ("pyramid", 4, (64, 96), lambda: _pvt_v2(linear_attention=True)),
    "cvt": ("pyramid", 6, (64, 96), _cvt),
    "detr": ("transformers_vit", 2, (64, 96), _detr),
    "rt_detr": ("transformers_vit", 1, (64, 96), _rt_detr),
}  # fmt: skip


class Named(torch.nn.Module):
    """A model of transformers that takes images by position, as ours do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        found = self.model(pixel_values=images)
        return getattr(
            found, "encoder_last_hidden_state", found
        )  # of detectors, whose decoder hardly sees a small change


def make(name, families=GLOBAL):
    """The model and three images."""
    _, _, size, build = families[name]
    torch.manual_seed(0)
    return shaken(Named(build()), 0.1), torch.randn(3, 3, *size)
