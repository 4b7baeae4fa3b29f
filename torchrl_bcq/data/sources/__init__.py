"""Readers of files and hubs with recorded steps, and memory-mapped copies of them."""
