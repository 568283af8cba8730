"""Triton kernels, installed as ``fastdl.kernels``. Importing this needs no Triton and no GPU."""
