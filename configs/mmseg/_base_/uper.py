# The head of UPerNet (arXiv 1807.10221), with pooling as in PSPNet.
_base_ = ["segmentor.py"]
model = dict(decode_head=dict(type="UPerHead", pool_scales=(1, 2, 3, 6), channels=512))
