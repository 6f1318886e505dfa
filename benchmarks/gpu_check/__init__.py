"""What a GPU is good for in a few minutes, by one command: python -m benchmarks.gpu_check."""
