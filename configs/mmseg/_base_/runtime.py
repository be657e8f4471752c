# What every config here has: the plug-in, its hook, AdamW by the units' rules, logs and checkpoints.
default_scope = "mmseg"
custom_imports = dict(imports=["vispeft.mmseg"], allow_failed_imports=False)
custom_hooks = [dict(type="VispeftHook")]
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="VispeftOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0),
)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=-1, save_best="mIoU", max_keep_ckpts=1),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
sync_bn = "torch"  # batch norms of several processes see one batch; one process has plain ones
env_cfg = dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="nccl"))
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
