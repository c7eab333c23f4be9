"""Generated Triton kernels (none yet)."""
