"""Generated Triton kernels of norms: a specification → readable, deterministic source → a launch.

spec.py:   what a kernel computes
launch.py: how it is cut into programs, and why
source.py: its Triton source, from templates/
build.py:  source → kernel
run.py:    tensors → launches
"""
