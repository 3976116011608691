"""Frozen value objects and identities: no I/O."""
