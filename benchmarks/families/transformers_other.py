"""Vision, audio and two-tower models of `transformers`.

Shapes: B batch, H = W image side, S samples of a waveform, T tokens. Images are [B, 3, H, W], waveforms [B, S].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.families.base import Family, Kind, Size, Task, generator
from benchmarks.families.huggingface import build_model, own_loss
from benchmarks.families.transformers_text import bert_like

NUM_CLASSES = 10
Batches = Callable[[Size], Callable[[int], dict[str, torch.Tensor]]]


def _images(size: Size, seed: int) -> torch.Tensor:
    return torch.randn(size.batch, 3, size.image, size.image, generator=generator(seed))


def _image_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    def batches(seed: int) -> dict[str, torch.Tensor]:
        labels = torch.randint(0, NUM_CLASSES, (size.batch,), generator=generator(seed + 1))
        return {"pixel_values": _images(size, seed), "labels": labels}

    return batches


def _pixel_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    """A class for each pixel; 255 marks pixels that do not count."""

    def batches(seed: int) -> dict[str, torch.Tensor]:
        shape = (size.batch, size.image, size.image)
        labels = torch.randint(0, NUM_CLASSES, shape, generator=generator(seed + 1))
        labels[torch.rand(shape, generator=generator(seed + 2)) < 0.1] = 255
        return {"pixel_values": _images(size, seed), "labels": labels}

    return batches


def _pair_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    def batches(seed: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, size.vocabulary - 1, (size.batch, size.length), generator=generator(seed + 1))
        tokens[:, -1] = size.vocabulary - 1  # the end token, at which the text tower reads its result
        return {"input_ids": tokens, "pixel_values": _images(size, seed)}

    return batches


def _speech_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    """Waveforms with short transcripts, for connectionist temporal classification."""

    def batches(seed: int) -> dict[str, torch.Tensor]:
        labels = torch.randint(1, 32, (size.batch, 4), generator=generator(seed + 1))
        return {"input_values": torch.randn(size.batch, size.audio, generator=generator(seed)), "labels": labels}

    return batches


def _sound_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    def batches(seed: int) -> dict[str, torch.Tensor]:
        labels = torch.randint(0, NUM_CLASSES, (size.batch,), generator=generator(seed + 1))
        return {"input_values": torch.randn(size.batch, size.audio, generator=generator(seed)), "labels": labels}

    return batches


def _spectrum_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    def batches(seed: int) -> dict[str, torch.Tensor]:
        features = torch.randn(size.batch, 16, 2 * size.length, generator=generator(seed))
        labels = torch.randint(3, size.vocabulary, (size.batch, size.length), generator=generator(seed + 1))
        return {"input_features": features, "labels": labels}

    return batches


def _vit(size: Size) -> dict[str, Any]:
    settings = bert_like(size)
    del settings["vocab_size"], settings["max_position_embeddings"]
    return {**settings, "image_size": size.image, "patch_size": 8, "num_labels": NUM_CLASSES}


def _swin(size: Size) -> dict[str, Any]:
    stages = {"embed_dim": size.width // 2, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "mlp_ratio": 2.0}
    return {"image_size": size.image, "patch_size": 4, **stages, "num_labels": NUM_CLASSES}


def _convnext(size: Size) -> dict[str, Any]:
    widths = [size.width // 2, size.width]
    stages = {"num_stages": 2, "hidden_sizes": widths, "depths": [1, 2]}
    return {"image_size": size.image, "patch_size": 4, **stages, "num_labels": NUM_CLASSES}


def _resnet(size: Size) -> dict[str, Any]:
    widths = [size.width // 2, size.width]
    stages = {"embedding_size": widths[0], "hidden_sizes": widths, "depths": [1, 1], "layer_type": "basic"}
    return {**stages, "num_labels": NUM_CLASSES}


def _regnet(size: Size) -> dict[str, Any]:
    """Grouped convolutions with squeeze-and-excitation; few blocks, since long batch-norm chains amplify rounding."""
    return {**_resnet(size), "layer_type": "y", "groups_width": 8}


def _segformer(size: Size) -> dict[str, Any]:
    stages = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [4, 2],
        "hidden_sizes": [size.width // 2, size.width],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    }
    return {**stages, "decoder_hidden_size": size.width, "num_labels": NUM_CLASSES}


def _clip(size: Size) -> dict[str, Any]:
    text = {**bert_like(size), "bos_token_id": 1, "eos_token_id": size.vocabulary - 1, "pad_token_id": 0}
    return {"text_config": text, "vision_config": _vit(size), "projection_dim": size.width}


def _speech(size: Size) -> dict[str, Any]:
    front = {
        "conv_dim": [size.width] * 3,
        "conv_stride": [5, 2, 2],
        "conv_kernel": [10, 3, 3],
        "num_feat_extract_layers": 3,
    }
    settings = bert_like(size)
    del settings["max_position_embeddings"]
    masks = {"apply_spec_augment": False, "mask_time_prob": 0.0}  # the masks are drawn by NumPy, in Python
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    return {
        **settings,
        **front,
        **positions,
        **masks,
        "vocab_size": 32,
        "pad_token_id": 0,
        "ctc_loss_reduction": "mean",
    }


def _whisper(size: Size) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": size.depth, f"{side}_attention_heads": size.heads, f"{side}_ffn_dim": size.hidden}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2, "use_cache": False}
    lengths = {"num_mel_bins": 16, "max_source_positions": size.length, "max_target_positions": size.length}
    return {"vocab_size": size.vocabulary, "d_model": size.width, **sides, **lengths, **special}


def _family(
    name: str,
    kind: Kind,
    model: str,
    config: str,
    settings: Callable[[Size], dict[str, Any]],
    batches: Batches,
    *,
    sgd_rate: float = 1e-2,
    adam_rate: float = 1e-3,
    **constant: Any,
) -> Family:
    rates = {"SGD": sgd_rate, "AdamW": adam_rate}

    def build(size: Size) -> Task:
        built = build_model(model, config, **settings(size))
        return Task(model=built, loss_fn=own_loss(**constant), batches=batches(size), learning_rates=rates)

    return Family(name=name, kind=kind, build=build, source="transformers")


def _sound(size: Size) -> dict[str, Any]:
    return {**_speech(size), "num_labels": NUM_CLASSES, "classifier_proj_size": size.width}


TRANSFORMERS_OTHER: tuple[Family, ...] = (
    _family("vit", "vision", "ViTForImageClassification", "ViTConfig", _vit, _image_batches),
    _family("swin", "vision", "SwinForImageClassification", "SwinConfig", _swin, _image_batches),
    _family("segformer", "vision", "SegformerForSemanticSegmentation", "SegformerConfig", _segformer, _pixel_batches),
    _family("convnext", "conv", "ConvNextForImageClassification", "ConvNextConfig", _convnext, _image_batches),
    _family("resnet", "conv", "ResNetForImageClassification", "ResNetConfig", _resnet, _image_batches),
    _family("regnet", "conv", "RegNetForImageClassification", "RegNetConfig", _regnet, _image_batches),
    _family("clip", "contrastive", "CLIPModel", "CLIPConfig", _clip, _pair_batches, adam_rate=1e-4, return_loss=True),
    _family("wav2vec2", "audio", "Wav2Vec2ForCTC", "Wav2Vec2Config", _speech, _speech_batches, sgd_rate=1e-3),
    _family("hubert", "audio", "HubertForSequenceClassification", "HubertConfig", _sound, _sound_batches),
    _family("whisper", "audio", "WhisperForConditionalGeneration", "WhisperConfig", _whisper, _spectrum_batches),
)
