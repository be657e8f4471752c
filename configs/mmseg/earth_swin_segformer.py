# vispeft train mmseg/earth_swin_segformer
# reaches a mean IoU of 0.489 on the validation images (benchmarks/results/config_figures.json)
_base_ = ["_base_/segformer.py", "_base_/earth.py", "_base_/runtime.py"]
model = dict(
    data_preprocessor=dict(size=(128, 128), mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        model="zoo:swin_tiny",
        peft=dict(type="LoRA", roles=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]),
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=96, num_classes=6),
)
