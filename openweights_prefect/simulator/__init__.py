"""A simulated RunPod: REST v2 whose pods are local processes."""
