-- Secrets of an organization: written by any member, read by admins and by the pod of a job that names them.
-- Supabase Vault keeps them where it is there; elsewhere only text that the client sealed is taken.

create function private.secret_storage() returns text
language sql stable
set search_path = ''
as $$ select case when to_regprocedure('vault.create_secret(text, text, text, uuid)') is null then 'sealed' else 'vault' end $$;

create function private.open_secret(secret ledger.organization_secrets) returns text
language plpgsql stable
set search_path = ''
as $$
declare
    value text := secret.sealed;
begin
    if secret.vault_id is not null then
        execute 'select decrypted_secret from vault.decrypted_secrets where id = $1' into value using secret.vault_id;
    end if;
    return value;
end
$$;

create function public.set_secret(secret_name text, secret_value text) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
declare
    org uuid := private.my_org();
    held ledger.organization_secrets;
    in_vault uuid;
begin
    if private.secret_storage() = 'sealed' and secret_value not like 'sealed:v1:%' then
        raise exception 'the value of secret % is not sealed, and this database has no Vault to keep it in', quote_literal(secret_name)
            using errcode = '22023';
    end if;
    if octet_length(secret_value) > 100000 then
        raise exception 'the value of secret % is longer than 100000 bytes', quote_literal(secret_name) using errcode = '22023';
    end if;
    perform pg_advisory_xact_lock(hashtextextended('ow_secret:' || org::text || secret_name, 0));
    select * into held from ledger.organization_secrets s where s.organization_id = org and s.name = secret_name;
    if private.secret_storage() = 'vault' then
        if held.vault_id is null then
            execute 'select vault.create_secret($1, $2)' into in_vault using secret_value, 'openweights/' || org || '/' || secret_name;
        else
            execute 'select vault.update_secret($1, $2)' using held.vault_id, secret_value;
            in_vault := held.vault_id;
        end if;
    end if;
    insert into ledger.organization_secrets as s (organization_id, name, sealed, vault_id, updated_by)
    values (org, secret_name, case when in_vault is null then secret_value end, in_vault,
            jsonb_strip_nulls(jsonb_build_object('user_id', private.my_user(), 'token_id', private.my_token())))
    on conflict (organization_id, name) do update
    set sealed = excluded.sealed, vault_id = excluded.vault_id, updated_at = now(), updated_by = excluded.updated_by;
    perform private.audit('set_secret', secret_name);
    return query select jsonb_build_object('outcome', case when held.name is null then 'created' else 'replaced' end);
end
$$;

-- Names only.
create function public.list_secrets(max_rows int default 1000, after_name text default null) returns setof jsonb
language sql stable security definer
set search_path = ''
as $$
    select jsonb_build_object('name', s.name, 'created_at', s.created_at, 'updated_at', s.updated_at, 'updated_by', s.updated_by)
    from ledger.organization_secrets s
    where s.organization_id = private.my_org() and (after_name is null or s.name > after_name)
    order by s.name
    limit max_rows
$$;

create function public.delete_secret(secret_name text) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
declare
    held ledger.organization_secrets;
begin
    perform private.require_admin();
    delete from ledger.organization_secrets s where s.organization_id = private.my_org() and s.name = secret_name returning * into held;
    if held.name is null then
        return query select jsonb_build_object('outcome', 'not_found');
        return;
    end if;
    if held.vault_id is not null then
        execute 'delete from vault.secrets where id = $1' using held.vault_id;
    end if;
    perform private.audit('delete_secret', secret_name);
    return query select jsonb_build_object('outcome', 'deleted');
end
$$;

create function public.read_secret(secret_name text) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
begin
    perform private.require_admin();
    return query select jsonb_build_object('name', s.name, 'value', private.open_secret(s))
                 from ledger.organization_secrets s where s.organization_id = private.my_org() and s.name = secret_name;
    if found then
        perform private.audit('read_secret', secret_name);
    end if;
end
$$;

-- For the rotation of the key that seals: everything that is sealed, and its replacement if it is still the same.
create function public.list_sealed() returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
begin
    perform private.require_admin();
    return query select jsonb_build_object('name', s.name, 'sealed', s.sealed)
                 from ledger.organization_secrets s where s.organization_id = private.my_org() and s.sealed is not null order by s.name;
end
$$;

create function public.replace_sealed(secret_name text, old_value text, new_value text) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
begin
    perform private.require_admin();
    update ledger.organization_secrets s set sealed = new_value
    where s.organization_id = private.my_org() and s.name = secret_name and s.sealed in (old_value, new_value);
    if not found then
        return query select jsonb_build_object('outcome', 'stale');
        return;
    end if;
    perform private.audit('rotate_secret', secret_name);
    return query select jsonb_build_object('outcome', 'replaced');
end
$$;

-- The secrets that the job of a run names, for the pod that holds the run.
create function public.job_secrets(for_run uuid, as_boot uuid) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
declare
    held ledger.jobs;
begin
    select j.* into held from private.pod_run() as p
    join ledger.runs r on r.id = p.run_id and r.boot = as_boot
    join ledger.jobs j on j.organization_id = r.organization_id and j.id = r.job_id
    where p.run_id = for_run;
    return query select jsonb_build_object('name', s.name, 'value', private.open_secret(s))
                 from ledger.organization_secrets s
                 where s.organization_id = held.organization_id and s.name = any (held.secrets)
                 order by s.name;
    if found then
        perform private.audit('hand_out_secrets', held.id, to_jsonb(held.secrets));
    end if;
end
$$;
