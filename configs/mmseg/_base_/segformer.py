# The all-MLP head of SegFormer (arXiv 2105.15203).
_base_ = ["segmentor.py"]
model = dict(decode_head=dict(type="SegformerHead", channels=256))
