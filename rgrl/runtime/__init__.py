"""Processes, machines and time: launching, exchanges, stopping, metrics over all ranks."""
