"""A toy data set, tiny backbones and a config, as somebody else's mmsegmentation script has them."""

from pathlib import Path

import torch
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

import vispeft
from vispeft.mmseg import VispeftBackbone

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
BACKBONES = {
    "vit": {"model": "vit_tiny_patch16_224", "model_args": VIT, "out_indices": [0, 1, 3]},
    "swin": {"model": "swin_tiny_patch4_window7_224", "model_args": SWIN, "out_indices": [0, 1, 2, 3]},
}
CHANNELS = {"vit": [32, 32, 32], "swin": [16, 32, 64, 128]}
CLASSES = ("dark", "red", "blue")


@DATASETS.register_module()
class ToyShapes(BaseSegDataset):
    METAINFO = {"classes": CLASSES, "palette": [[0, 0, 0], [255, 0, 0], [0, 0, 255]]}


def loader(root, split, *pipeline, batch=2, sampler):
    annotations = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
    last = [{"type": "PackSegInputs"}]
    return {
        "batch_size": batch,
        "num_workers": 0,
        "sampler": sampler,
        "dataset": {
            "type": "ToyShapes",
            "data_root": str(root),
            "img_suffix": ".png",
            "data_prefix": {"img_path": f"images/{split}", "seg_map_path": f"masks/{split}"},
            "pipeline": [*annotations, *pipeline, *last],
        },
    }


def make_config(family, toy, weights, work_dir, peft=None, **options):
    """Write a whole config: SegFormer head, two iterations, one validation."""
    crop = [{"type": "RandomCrop", "crop_size": (64, 64)}, {"type": "RandomFlip", "prob": 0.5}]
    backbone = {"type": "VispeftBackbone", "peft": peft or {"type": "SSF"}, "weights": str(weights[family])}
    bn = {"type": "BN", "requires_grad": True}
    width = CHANNELS[family]
    head = {"in_channels": width, "in_index": list(range(len(width))), "channels": 16, "num_classes": 3}
    test = [{"type": "LoadImageFromFile"}, {"type": "PackSegInputs"}]
    tree = {
        "custom_imports": {"imports": ["vispeft.mmseg"]},
        "default_scope": "mmseg",
        "work_dir": str(work_dir),
        "randomness": {"seed": 0},
        "model": {
            "type": "EncoderDecoder",
            "data_preprocessor": {
                "type": "SegDataPreProcessor",
                "mean": [123.675, 116.28, 103.53],
                "std": [58.395, 57.12, 57.375],
                "bgr_to_rgb": True,
                "size": (64, 64),
                "seg_pad_val": 255,
            },
            "backbone": {**backbone, **BACKBONES[family]},
            "decode_head": {"type": "SegformerHead", "norm_cfg": bn, **head},
            "train_cfg": {},
            "test_cfg": {"mode": "whole"},
        },
        "train_dataloader": loader(toy, "train", *crop, sampler={"type": "InfiniteSampler", "shuffle": True}),
        "val_dataloader": loader(toy, "val", batch=1, sampler={"type": "DefaultSampler", "shuffle": False}),
        "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "test_pipeline": test,
        "optim_wrapper": {
            "type": "OptimWrapper",
            "constructor": "VispeftOptimWrapperConstructor",
            "optimizer": {"type": "AdamW", "lr": 0.01, "weight_decay": 0.01},
        },
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 2, "val_interval": 2},
        "val_cfg": {"type": "ValLoop"},
        "default_hooks": {
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2, "save_best": "mIoU"}
        },
        "custom_hooks": [{"type": "VispeftHook"}],
        "log_level": "WARNING",
        **options,
    }
    config = Config(tree)
    config.dump(str(Path(work_dir) / "toy.py"))
    return config


def image_of(toy):
    return str(next((toy / "images" / "val").iterdir()))


def logits(model, toy):
    return inference_model(model, image_of(toy)).seg_logits.data


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def plain(family, weights):
    backbone = BACKBONES[family]
    options = {"num_classes": 0, "flexible_size": True, **backbone["model_args"]}
    return vispeft.create_model(backbone["model"], weights=weights[family], **options)


def backbone_of(family, weights, **options):
    return VispeftBackbone(weights=str(weights[family]), **{**BACKBONES[family], **options})


def reloaded(trained):
    return init_model(str(trained.config), str(trained.place / "iter_2.pth"), device="cpu")
