"""Generated Triton kernels of norms: a specification → readable, deterministic source → a launch.

spec.py:   what a kernel computes
launch.py: how it is cut into programs, and why
rows.py, forward.py, backward.py: the lines of its kernels
source.py: its Triton source
build.py:  source → kernel
run.py:    tensors → launches
refold.py: kept folds renewed on a device without a wait (a prototype)
"""
