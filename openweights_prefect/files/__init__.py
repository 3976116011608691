"""Hashing, validation and storage of files."""
