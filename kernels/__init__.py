"""The training step of vit.ViT as Triton kernels; step.py lists its launches, in order."""
