# vispeft train mmseg/earth_vit_fcn
# reaches: not measured yet
_base_ = ["_base_/fcn.py", "_base_/earth_small.py", "_base_/runtime.py"]
model = dict(
    data_preprocessor=dict(size=(64, 64), mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        model="zoo:vit_tiny",
        peft=dict(type="SSF"),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=96, num_classes=6),
    # Windows of the size it was trained with, since positions are stretched to the size of what is seen.
    test_cfg=dict(mode="slide", crop_size=(64, 64), stride=(48, 48)),
)
