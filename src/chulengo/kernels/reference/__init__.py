"""Every operation in plain PyTorch: the definition that the fused kernels are tested against, and what CPUs run."""
