-- The roles of a Supabase project; they belong to the whole server.
do $$
declare
  role_name text;
begin
  foreach role_name in array array[
    'anon', 'authenticated', 'service_role', 'authenticator',
    'supabase_auth_admin', 'supabase_storage_admin', 'project_owner'
  ] loop
    if to_regrole(role_name) is null then
      execute format('create role %I noinherit', role_name);
    end if;
  end loop;
end
$$;

alter role authenticator login;
alter role service_role bypassrls;
grant anon, authenticated, service_role to authenticator;

-- Migrations are applied by this one, which is no superuser: the role `postgres` of a hosted project.
alter role project_owner inherit createrole bypassrls;
grant anon, authenticated, service_role, authenticator to project_owner with admin option;
-- A hosted project lets its owner make policies on `storage.objects` without owning it; here it may own it.
grant supabase_storage_admin to project_owner;

-- Other databases of this server may have made the roles of the ledger already.
do $$
declare
  role_name text;
begin
  for role_name in select rolname from pg_roles where rolname in ('ow_worker', 'ow_pod') loop
    execute format('grant %I to project_owner with admin option', role_name);
  end loop;
end
$$;
