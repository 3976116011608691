"""A user's package in a subfolder of a repository."""
