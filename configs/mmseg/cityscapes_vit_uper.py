# vispeft train mmseg/cityscapes_vit_uper
# reaches: not measured yet
_base_ = ["_base_/uper.py", "_base_/cityscapes.py", "_base_/runtime.py"]
model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(
        model="vit_small_patch16_dinov3.lvd1689m",
        peft=dict(type="LoRA", roles=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]),
        levels="vitdet",  # one map becomes four, from a quarter of the patch to twice the patch
        width=256,
    ),
    decode_head=dict(in_channels=[256, 256, 256, 256], num_classes=19),
    # Windows of the size it was trained with, since positions are stretched to the size of what is seen.
    test_cfg=dict(mode="slide", crop_size=(512, 1024), stride=(341, 682)),
)
