# vispeft train mmseg/earth_swin_fcn
# reaches: not measured yet
_base_ = ["_base_/fcn.py", "_base_/earth.py", "_base_/runtime.py"]
model = dict(
    data_preprocessor=dict(size=(128, 128), mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        model="zoo:swin_tiny",
        peft=dict(type="AdaptFormer"),
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=96, num_classes=6),
)
