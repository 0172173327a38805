"""Faster implementations of pieces of vit.py: the training step as Triton kernels, and the stem
for a CPU. step.py lists the launches of a step, in order.
"""
