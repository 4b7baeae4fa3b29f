"""Reads recorded steps from files and from dataset hubs, and makes memory-mapped copies of them."""
