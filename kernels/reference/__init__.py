"""The definition of every operation: plain fp32 PyTorch that the fast kernels are tested against."""
