# vispeft train mmseg/cityscapes_swin_fcn
# reaches: not measured yet
_base_ = ["_base_/fcn.py", "_base_/cityscapes.py", "_base_/runtime.py"]
model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(
        model="swin_tiny_patch4_window7_224.ms_in1k",
        peft=dict(type="AdaptFormer"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=19),
)
