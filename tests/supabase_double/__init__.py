"""Supabase as the tests need it: its HTTP API over a real PostgreSQL with real row-level security.

Every request is one transaction as the caller's database role, so grants, policies and constraints are
PostgreSQL's own. Ours, and therefore what may differ from the service: URLs, status codes, shapes of JSON.
"""

from __future__ import annotations

from tests.supabase_double.server import SupabaseDouble, prepare_project, prepare_server

__all__ = ["SupabaseDouble", "prepare_project", "prepare_server"]
