"""Pods: the provider, hardware, placement."""
