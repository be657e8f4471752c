# Two 3x3 convolutions (arXiv 1411.4038) on all maps, resized to the finest one.
_base_ = ["segmentor.py"]
model = dict(decode_head=dict(type="FCNHead", input_transform="resize_concat", num_convs=2, channels=256))
