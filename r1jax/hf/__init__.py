"""Hugging Face checkpoints of DeepSeek-V2, V3 and R1, in and out."""
