"""The ledger: one PostgreSQL schema, reached through `call()`."""
