"""The agent: the process that runs in a pod."""
