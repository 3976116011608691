"""The command `ow`."""
