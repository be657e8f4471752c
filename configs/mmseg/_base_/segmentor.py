# What the segmentors share: normalisation, the backbone of the plug-in, and how heads are trained and used.
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        # The size of the crops is in each config. Test images are padded to whole patches, and the scores of what was
        # added are cut off again.
        test_cfg=dict(size_divisor=32),
    ),
    backbone=dict(type="VispeftBackbone"),
    decode_head=dict(
        in_index=[0, 1, 2, 3],
        dropout_ratio=0.1,
        norm_cfg=dict(type="BN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
