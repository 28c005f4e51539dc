"""The definition of every operation: plain fp32 PyTorch that fast kernels are tested against."""
