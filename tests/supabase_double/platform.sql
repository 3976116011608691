-- What a new Supabase project has before the first migration, as far as the ledger touches it. Run as a
-- superuser in an empty database that `project_owner` owns.

-- Older projects grant everything new in `public` to the API roles: the harder case for the migrations.
grant all on schema public to project_owner;
grant usage on schema public to anon, authenticated, service_role;
alter default privileges for role project_owner in schema public grant all on tables to anon, authenticated, service_role;
alter default privileges for role project_owner in schema public grant all on sequences to anon, authenticated, service_role;
alter default privileges for role project_owner in schema public grant all on functions to anon, authenticated, service_role;

create schema extensions authorization project_owner;
grant usage on schema extensions to anon, authenticated, service_role;

-- Auth -----------------------------------------------------------------------------------------------------

create schema auth authorization supabase_auth_admin;
grant usage on schema auth to anon, authenticated, service_role, project_owner;

create table auth.users (
    id uuid primary key default gen_random_uuid(),
    aud text not null default 'authenticated',
    role text not null default 'authenticated',
    email text unique,
    encrypted_password text,
    email_confirmed_at timestamptz,
    last_sign_in_at timestamptz,
    raw_app_meta_data jsonb not null default '{"provider": "email", "providers": ["email"]}',
    raw_user_meta_data jsonb not null default '{}',
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

create table auth.identities (
    id uuid primary key default gen_random_uuid(),
    user_id uuid not null references auth.users on delete cascade,
    provider text not null,
    provider_id text not null,
    identity_data jsonb not null,
    created_at timestamptz not null default now(),
    unique (provider_id, provider)
);

create table auth.sessions (
    id uuid primary key default gen_random_uuid(),
    user_id uuid not null references auth.users on delete cascade,
    created_at timestamptz not null default now()
);

create table auth.refresh_tokens (
    id bigint generated always as identity primary key,
    token text not null unique,
    parent text,
    session_id uuid not null references auth.sessions on delete cascade,
    revoked boolean not null default false,
    updated_at timestamptz not null default now()
);

alter table auth.users owner to supabase_auth_admin;
alter table auth.identities owner to supabase_auth_admin;
alter table auth.sessions owner to supabase_auth_admin;
alter table auth.refresh_tokens owner to supabase_auth_admin;
alter table auth.users enable row level security;
alter table auth.identities enable row level security;
alter table auth.sessions enable row level security;
alter table auth.refresh_tokens enable row level security;
grant select, references on auth.users to project_owner;

create function auth.jwt() returns jsonb language sql stable
as $$ select coalesce(nullif(current_setting('request.jwt.claim', true), ''),
                      nullif(current_setting('request.jwt.claims', true), ''))::jsonb $$;

create function auth.uid() returns uuid language sql stable
as $$ select nullif(auth.jwt() ->> 'sub', '')::uuid $$;

create function auth.role() returns text language sql stable
as $$ select auth.jwt() ->> 'role' $$;

-- Storage --------------------------------------------------------------------------------------------------

create schema storage authorization supabase_storage_admin;
grant usage on schema storage to anon, authenticated, service_role, project_owner;

create table storage.buckets (
    id text primary key,
    name text not null unique,
    owner_id text,
    public boolean not null default false,
    file_size_limit bigint,
    allowed_mime_types text[],
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

create table storage.objects (
    id uuid primary key default gen_random_uuid(),
    bucket_id text references storage.buckets,
    name text,
    owner uuid,
    owner_id text,
    version text,
    metadata jsonb,
    user_metadata jsonb,
    path_tokens text[] generated always as (string_to_array(name, '/')) stored,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    last_accessed_at timestamptz not null default now()
);
create unique index bucketid_objname on storage.objects (bucket_id, name);

create function storage.foldername(name text) returns text[] language sql immutable
as $$ select parts[1 : cardinality(parts) - 1] from string_to_array(name, '/') as parts $$;

create function storage.filename(name text) returns text language sql immutable
as $$ select parts[cardinality(parts)] from string_to_array(name, '/') as parts $$;

create function storage.protect_delete() returns trigger language plpgsql
as $$
begin
    if coalesce(current_setting('storage.allow_delete_query', true), 'false') <> 'true' then
        raise exception 'Direct deletion from storage tables is not allowed. Use the Storage API instead.'
            using errcode = '42501';
    end if;
    return null;
end
$$;
create trigger protect_objects_delete before delete on storage.objects
    for each statement execute function storage.protect_delete();

alter table storage.buckets owner to supabase_storage_admin;
alter table storage.objects owner to supabase_storage_admin;
alter table storage.buckets enable row level security;
alter table storage.objects enable row level security;
grant all on storage.buckets, storage.objects to anon, authenticated, service_role;
grant all on storage.buckets, storage.objects to project_owner with grant option;

-- Vault ----------------------------------------------------------------------------------------------------

create schema vault;
grant usage on schema vault to project_owner, service_role;

create table vault.secrets (
    id uuid primary key default gen_random_uuid(),
    name text,
    description text not null default '',
    secret text not null,
    key_id uuid,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
create unique index secrets_name_idx on vault.secrets (name) where name is not null;

-- No encryption: it only keeps the plain text out of the column, as Vault does.
create function vault.encode(plain text) returns text language sql immutable
as $$ select encode(convert_to(plain, 'utf8'), 'base64') $$;

create view vault.decrypted_secrets as
select id, name, description, secret, convert_from(decode(secret, 'base64'), 'utf8') as decrypted_secret,
       key_id, created_at, updated_at
from vault.secrets;

create function vault.create_secret(
    new_secret text, new_name text default null, new_description text default '', new_key_id uuid default null
) returns uuid language sql security definer set search_path = ''
as $$
    insert into vault.secrets (secret, name, description)
    values (vault.encode(new_secret), new_name, new_description) returning id
$$;

create function vault.update_secret(
    secret_id uuid, new_secret text default null, new_name text default null,
    new_description text default null, new_key_id uuid default null
) returns void language sql security definer set search_path = ''
as $$
    update vault.secrets set
        secret = coalesce(vault.encode(new_secret), secret),
        name = coalesce(new_name, name),
        description = coalesce(new_description, description),
        updated_at = now()
    where id = secret_id
$$;

revoke all on all functions in schema vault from public;
grant execute on all functions in schema vault to project_owner, service_role;
grant select, delete on vault.secrets, vault.decrypted_secrets to project_owner, service_role;
