"""Kernels in Triton for any GPU that it compiles for; imported at the first use (ops/_triton.py).

conv.py      the fused convolution and the sum of its parts; add_relu.py
problem.py   a convolution's sizes; config.py: tiles, and the rule that picks one; device.py
plan.py      grids, constants and workspace of a launch; launch.py: tensors to launches
"""
