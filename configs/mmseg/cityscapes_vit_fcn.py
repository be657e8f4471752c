# vispeft train mmseg/cityscapes_vit_fcn
# reaches: not measured yet
_base_ = ["_base_/fcn.py", "_base_/cityscapes.py", "_base_/runtime.py"]
model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(
        model="vit_small_patch16_dinov3.lvd1689m",
        peft=dict(type="SSF"),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384], num_classes=19),
    # Windows of the size it was trained with, since positions are stretched to the size of what is seen.
    test_cfg=dict(mode="slide", crop_size=(512, 1024), stride=(341, 682)),
)
