# vispeft train mmseg/ade20k_swin_segformer
# reaches: not measured yet
_base_ = ["_base_/segformer.py", "_base_/ade20k.py", "_base_/runtime.py"]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        model="swin_tiny_patch4_window7_224.ms_in1k",
        peft=dict(type="LoRA", roles=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
)
