"""Every operation as Triton kernels with hand-derived backwards. Same signatures as `reference/`."""
