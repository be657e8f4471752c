"""Names of a backbone small enough for tests that train."""

TINY = {"pretrained": False, "img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
"""Arguments of `create_model` that make ``vit_tiny_patch16_224`` tiny."""

CONFIG = """
model:
  class_path: vispeft.tasks.Classification
  init_args:
    backbone: vit_tiny_patch16_224
    backbone_args: {pretrained: false, img_size: 16, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
    method:
      class_path: vispeft.SSF
    lr: 1e-2
data:
  class_path: vispeft.data.DigitsData
  init_args:
    batch_size: 256
trainer:
  max_epochs: 2
"""
"""A config that trains it for a few seconds."""
