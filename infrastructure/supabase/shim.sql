-- What the migrations need of Supabase, for a plain PostgreSQL 15 or newer. The migrator runs it first, as a
-- superuser, in one transaction. It adds what is missing and changes nothing that is there.

-- Roles belong to the whole server: another database's migrator may create them at the same moment.
do $$
declare
  role_name text;
begin
  foreach role_name in array array['anon', 'authenticated', 'service_role', 'authenticator'] loop
    if to_regrole(role_name) is null then
      begin
        execute format(
          'create role %I noinherit %s %s',
          role_name,
          case role_name when 'authenticator' then 'login' else 'nologin' end,
          case role_name when 'service_role' then 'bypassrls' else '' end
        );
      exception
        when duplicate_object or unique_violation then null;
      end;
    end if;
  end loop;

  -- The one login of the API may become each of the three, and has no right of its own.
  foreach role_name in array array['anon', 'authenticated', 'service_role'] loop
    if not pg_has_role('authenticator', role_name, 'member') then
      begin
        execute format('grant %I to authenticator', role_name);
      exception
        when unique_violation then null;
      end;
    end if;
  end loop;
end
$$;

create schema if not exists auth;
create schema if not exists extensions;

grant usage on schema public, auth, extensions to anon, authenticated, service_role;

do $shim$
begin
  if to_regprocedure('auth.jwt()') is null then
    create function auth.jwt() returns jsonb
    language sql stable parallel safe
    set search_path = ''
    as $$ select nullif(current_setting('request.jwt.claims', true), '')::jsonb $$;
    comment on function auth.jwt() is 'The claims of the caller, or null where there are none.';
  end if;

  if to_regprocedure('auth.uid()') is null then
    create function auth.uid() returns uuid
    language sql stable parallel safe
    set search_path = ''
    as $$ select nullif(auth.jwt() ->> 'sub', '')::uuid $$;
    comment on function auth.uid() is 'The user of the caller, or null where there is none.';
  end if;
end
$shim$;
