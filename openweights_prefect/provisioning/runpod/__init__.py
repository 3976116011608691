"""RunPod's REST v2."""
