"""The dropless expert FFN in kernels for NVIDIA GPUs, written in Pallas for Triton."""
