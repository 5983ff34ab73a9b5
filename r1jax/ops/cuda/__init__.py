"""Kernels in CUDA C++, compiled when a program is built (`cuda_source.py`)."""
