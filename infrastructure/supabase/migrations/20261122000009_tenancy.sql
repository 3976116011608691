-- Organizations, members, tokens, and the exchange of secrets for claims.
-- Definer functions: each names the caller's organization itself, because row-level security does not bind its owner.

create function public.whoami() returns setof jsonb
language sql stable security definer
set search_path = ''
as $$
    select jsonb_build_object(
        'organization_id', o.id, 'organization_name', o.name, 'role', private.my_role(),
        'user_id', private.my_user(), 'email', m.email, 'token_id', t.id, 'token_name', t.name,
        'secret_storage', private.secret_storage())
    from ledger.organizations o
    left join ledger.members m on m.organization_id = o.id and m.user_id = private.my_user()
    left join ledger.api_tokens t on t.id = private.my_token()
    where o.id = private.my_org()
$$;

-- Organizations -------------------------------------------------------------------------------

-- The person who calls, by a session of its own: a token is bound to its organization.
create function private.me_in_person() returns uuid
language plpgsql stable
set search_path = ''
as $$
declare
    claims jsonb := private.claims();
begin
    if claims ->> 'sub' is null or claims ? 'token_id' or claims ->> 'role' <> 'authenticated'
       or claims ->> 'aud' is distinct from 'authenticated'
       or to_timestamp((claims ->> 'exp')::double precision) <= now() then
        raise exception 'this needs a person who has signed in; a token acts for one organization only' using errcode = '42501';
    end if;
    return (claims ->> 'sub')::uuid;
end
$$;

create function public.create_organization(organization_id uuid, name text, email text default null) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
    me uuid := private.me_in_person();
    made boolean;
begin
    if (select count(*) from ledger.members m where m.user_id = me and m.role = 'admin') >= 100 then
        raise exception 'a person may be the admin of at most 100 organizations' using errcode = '42501';
    end if;
    insert into ledger.organizations (id, name) values (create_organization.organization_id, create_organization.name)
    on conflict (id) do nothing;
    made := found;
    if made then
        insert into ledger.members (organization_id, user_id, role, email)
        values (create_organization.organization_id, me, 'admin', create_organization.email);
        perform private.audit('create_organization', create_organization.name, '{}', create_organization.organization_id);
    elsif not exists (select from ledger.members m
                      where m.organization_id = create_organization.organization_id and m.user_id = me) then
        raise exception 'the organization id is taken' using errcode = '42501';
    end if;
    return query select jsonb_build_object('outcome', case when made then 'created' else 'exists' end, 'organization', to_jsonb(o))
                 from ledger.organizations o where o.id = create_organization.organization_id;
end
$$;

-- Those that the person belongs to; for a token, its own.
create function public.list_organizations(max_rows int default 100, after_id uuid default null) returns setof jsonb
language sql stable security definer
set search_path = ''
as $$
    select to_jsonb(o) || jsonb_build_object('role', m.role)
    from (select coalesce(private.my_user(), private.me_in_person()) as id) as me
    join ledger.members m on m.user_id = me.id
    join ledger.organizations o on o.id = m.organization_id
    where case when private.my_token() is null then private.me_in_person() is not null else o.id = private.my_org() end
      and (after_id is null or o.id > after_id)
    order by o.id
    limit max_rows
$$;

create function public.rename_organization(new_name text) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
begin
    perform private.require_admin();
    update ledger.organizations o set name = new_name where o.id = private.my_org();
    perform private.audit('rename_organization', new_name);
    return query select to_jsonb(o) from ledger.organizations o where o.id = private.my_org();
end
$$;

-- Members -------------------------------------------------------------------------------------

create function public.list_members(max_rows int default 100, after_id uuid default null) returns setof jsonb
language sql stable
set search_path = ''
as $$
    select to_jsonb(m) from ledger.members m
    where after_id is null or m.user_id > after_id
    order by m.user_id
    limit max_rows
$$;

-- Locks the organization, so that two admins cannot demote each other at the same moment.
create function private.keep_an_admin(besides uuid) returns void
language plpgsql
set search_path = ''
as $$
begin
    perform from ledger.organizations o where o.id = private.my_org() for update;
    if not exists (select from ledger.members m
                   where m.organization_id = private.my_org() and m.role = 'admin' and m.user_id <> besides) then
        raise exception 'the last admin of an organization stays one; make somebody else an admin first' using errcode = '42501';
    end if;
end
$$;

create function public.set_member_role(member uuid, new_role text) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
begin
    perform private.require_admin();
    if new_role <> 'admin' then
        perform private.keep_an_admin(member);
    end if;
    update ledger.members m set role = new_role where m.organization_id = private.my_org() and m.user_id = member;
    if not found then
        return query select jsonb_build_object('outcome', 'not_found');
        return;
    end if;
    perform private.audit('set_member_role', member::text, jsonb_build_object('role', new_role));
    return query select jsonb_build_object('outcome', 'set');
end
$$;

-- By an admin, or by the member itself. Its tokens are worth nothing from the next call on.
create function public.remove_member(member uuid) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
begin
    if member is distinct from private.my_user() or private.my_token() is not null then
        perform private.require_admin();
    end if;
    if exists (select from ledger.members m
               where m.organization_id = private.my_org() and m.user_id = member and m.role = 'admin') then
        perform private.keep_an_admin(member);
    end if;
    perform private.audit('remove_member', member::text);
    delete from ledger.members m where m.organization_id = private.my_org() and m.user_id = member;
    return query select jsonb_build_object('outcome', case when found then 'removed' else 'not_found' end);
end
$$;

create function public.create_invitation(
    code_hash text, new_role text default 'user', for_email text default null, valid_seconds int default 604800
) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
begin
    perform private.require_admin();
    if valid_seconds is null or valid_seconds not between 1 and 2592000 then
        raise exception 'valid_seconds=% is not between 1 and 2592000 (30 days)', valid_seconds using errcode = '22023';
    end if;
    insert into ledger.invitations (organization_id, code_hash, role, email, created_by, expires_at)
    values (private.my_org(), create_invitation.code_hash, new_role, for_email, private.my_user(),
            now() + make_interval(secs => valid_seconds))
    on conflict do nothing;
    if found then
        perform private.audit('create_invitation', coalesce(for_email, ''), jsonb_build_object('role', new_role));
    end if;
    return query select jsonb_build_object('outcome', 'created', 'invitation', to_jsonb(i) - 'code_hash')
                 from ledger.invitations i
                 where i.organization_id = private.my_org() and i.code_hash = create_invitation.code_hash;
end
$$;

create function public.list_invitations(max_rows int default 100, after_id uuid default null) returns setof jsonb
language plpgsql stable security definer
set search_path = ''
as $$
begin
    perform private.require_admin();
    return query
        select to_jsonb(i) - 'code_hash' from ledger.invitations i
        where i.organization_id = private.my_org()
          and (after_id is null or (i.created_at, i.id) < (select a.created_at, a.id from ledger.invitations a where a.id = after_id))
        order by i.created_at desc, i.id desc
        limit max_rows;
end
$$;

create function public.accept_invitation(code_hash text, email text default null) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
    me uuid := private.me_in_person();
    held ledger.invitations;
begin
    select * into held from ledger.invitations i where i.code_hash = accept_invitation.code_hash for update;
    if held.id is null or (held.accepted_at is null and held.expires_at <= now())
       or (held.accepted_at is not null and held.accepted_by <> me) then
        return query select jsonb_build_object('outcome', 'refused');
        return;
    end if;
    if held.accepted_at is null then
        update ledger.invitations i set accepted_by = me, accepted_at = now() where i.id = held.id;
        insert into ledger.members (organization_id, user_id, role, email)
        values (held.organization_id, me, held.role, accept_invitation.email)
        on conflict (organization_id, user_id) do nothing;
        perform private.audit('accept_invitation', me::text, jsonb_build_object('role', held.role), held.organization_id);
    end if;
    return query select jsonb_build_object('outcome', 'accepted', 'organization', to_jsonb(o))
                 from ledger.organizations o where o.id = held.organization_id;
end
$$;

-- Tokens --------------------------------------------------------------------------------------

-- What a token may still give away: its limit less what it spent and what it gave to others; null without a limit.
create function private.token_rest(for_token uuid) returns numeric
language sql stable security definer
set search_path = ''
as $$
    select t.spend_limit_usd - private.token_spent(t.id)
           - coalesce((select sum(c.spend_limit_usd) from ledger.api_tokens c where c.minted_by = t.id), 0)
    from ledger.api_tokens t where t.id = for_token and t.spend_limit_usd is not null
$$;

-- True when the token may start nothing more.
create function private.is_spent(for_token uuid) returns boolean
language sql stable security definer
set search_path = ''
as $$ select for_token is not null and coalesce(private.token_rest(for_token) <= 0, false) $$;

-- Without secrets: what a token row shows to others.
create function private.shown_token(token ledger.api_tokens) returns jsonb
language sql stable
set search_path = ''
as $$
    select to_jsonb(token) - 'token_hash' || jsonb_build_object('spent_usd', private.token_spent(token.id),
        'state', case when token.revoked_at is not null then 'revoked'
                      when token.expires_at <= now() then 'expired' else 'active' end)
$$;

-- The caller made the token and keeps it; only its hash comes here. Nobody mints more than it has itself.
create function public.create_token(
    token_name text, hash text, prefix text, token_role text default 'user', valid_seconds int default null,
    spend_limit_usd numeric default null
) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
    org uuid := private.my_org();
    parent ledger.api_tokens;
    ends timestamptz;
begin
    if token_role <> 'user' then
        perform private.require_admin();
    end if;
    if valid_seconds <= 0 then
        raise exception 'valid_seconds=% is not positive', valid_seconds using errcode = '22023';
    end if;
    ends := now() + make_interval(secs => valid_seconds);
    -- Two requests of one limited token must not both get its rest.
    select * into parent from ledger.api_tokens t where t.id = private.my_token() for update;
    if parent.expires_at is not null and (ends is null or ends > parent.expires_at) then
        ends := parent.expires_at;
    end if;
    if exists (select from ledger.api_tokens t where t.token_hash = hash and t.organization_id = org) then
        null;  -- asked again: the first answer was lost
    elsif parent.spend_limit_usd is not null
          and (create_token.spend_limit_usd is null or create_token.spend_limit_usd > private.token_rest(parent.id)) then
        raise exception 'spend_limit_usd=% is more than the % that the minting token has left',
            coalesce(create_token.spend_limit_usd::text, 'unlimited'), greatest(private.token_rest(parent.id), 0)
            using errcode = '42501';
    else
        insert into ledger.api_tokens (organization_id, name, role, prefix, token_hash, created_by, minted_by,
                                       spend_limit_usd, expires_at)
        values (org, token_name, token_role, create_token.prefix, hash, private.my_user(), parent.id,
                create_token.spend_limit_usd, ends);
        perform private.audit('create_token', token_name, jsonb_build_object('role', token_role, 'prefix', create_token.prefix));
    end if;
    return query select jsonb_build_object('outcome', 'created', 'token', private.shown_token(t))
                 from ledger.api_tokens t where t.token_hash = hash and t.organization_id = org;
end
$$;

-- One's own; for an admin, all of the organization.
create function public.list_tokens(max_rows int default 100, after_id uuid default null) returns setof jsonb
language plpgsql stable security definer
set search_path = ''
as $$
declare
    everything boolean := private.my_role() = 'admin';
begin
    return query
        select private.shown_token(t) from ledger.api_tokens t
        where t.organization_id = private.my_org() and (everything or t.created_by = private.my_user())
          and (after_id is null or (t.created_at, t.id) < (select a.created_at, a.id from ledger.api_tokens a where a.id = after_id))
        order by t.created_at desc, t.id desc
        limit max_rows;
end
$$;

-- With everything that it minted.
create function public.revoke_token(token_id uuid) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
declare
    held ledger.api_tokens;
begin
    select * into held from ledger.api_tokens t where t.id = revoke_token.token_id and t.organization_id = private.my_org();
    if held.id is null or (held.created_by <> private.my_user() and private.my_role() <> 'admin') then
        return query select jsonb_build_object('outcome', 'not_found');
        return;
    end if;
    with recursive minted as (
        select held.id
        union
        select t.id from ledger.api_tokens t join minted on t.minted_by = minted.id)
    update ledger.api_tokens t set revoked_at = now() from minted where t.id = minted.id and t.revoked_at is null;
    if found then
        -- The organization is named: a token that revoked itself speaks for none any more.
        perform private.audit('revoke_token', held.name, jsonb_build_object('prefix', held.prefix), held.organization_id);
    end if;
    return query select jsonb_build_object('outcome', 'revoked');
end
$$;

create function public.set_token_limit(token_id uuid, spend_limit_usd numeric) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
begin
    perform private.require_admin();
    -- An admin's token cannot raise its own limit, nor that of what it comes from.
    if (select t.spend_limit_usd from ledger.api_tokens t where t.id = private.my_token()) is not null then
        raise exception 'a token with a spending limit sets no limits' using errcode = '42501';
    end if;
    update ledger.api_tokens t set spend_limit_usd = set_token_limit.spend_limit_usd
    where t.id = set_token_limit.token_id and t.organization_id = private.my_org();
    if not found then
        return query select jsonb_build_object('outcome', 'not_found');
        return;
    end if;
    perform private.audit('set_token_limit', set_token_limit.token_id::text, jsonb_build_object('usd', set_token_limit.spend_limit_usd));
    return query select jsonb_build_object('outcome', 'set');
end
$$;

-- The exchange, for the service role alone ------------------------------------------------------

-- Seconds to wait when `who` was refused too often in the last minutes; null when it may try. What is good is granted
-- all the same: somebody else behind the same address may be guessing.
create function private.must_wait(who text) returns int
language sql stable
set search_path = ''
as $$
    select ceil(extract(epoch from min(r.minute) + interval '5 minutes' - now()))::int
    from private.refused_exchanges r
    where r.source = who and r.minute > now() - interval '5 minutes'
    having sum(r.refusals) >= 30
$$;

create function private.count_refusal(who text) returns void
language plpgsql
set search_path = ''
as $$
begin
    insert into private.refused_exchanges as r (source, minute) values (left(who, 200), date_trunc('minute', now()))
    on conflict (source, minute) do update set refusals = r.refusals + 1;
    delete from private.refused_exchanges r where r.minute < now() - interval '1 hour';
end
$$;

-- The claims that an API token, or the session secret of a pod, stands for: at most 15 minutes of them.
create function public.exchange_token(hash text, source text default '') returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    wait int := private.must_wait(left(source, 200));
    issued bigint := floor(extract(epoch from now()));
    claims jsonb;
begin
    update ledger.api_tokens t set last_used_at = now()
    where t.token_hash = hash and t.revoked_at is null and (t.expires_at is null or t.expires_at > now())
      and exists (select from ledger.members m where m.organization_id = t.organization_id and m.user_id = t.created_by)
    returning jsonb_build_object(
        'role', case t.role when 'worker' then 'ow_worker' else 'authenticated' end, 'sub', t.created_by,
        'organization_id', t.organization_id, 'token_id', t.id,
        'exp', least(issued + 900, floor(extract(epoch from t.expires_at)))) into claims;
    if claims is null then
        select jsonb_build_object('role', 'ow_pod', 'organization_id', w.organization_id, 'worker_id', w.id,
                                  'session', w.session_hash, 'exp', issued + 900)
        into claims from ledger.worker w where w.session_hash = hash and w.status <> 'terminated';
    end if;
    if claims is null and wait is not null then
        return query select jsonb_build_object('outcome', 'limited', 'retry_after', wait);
        return;
    elsif claims is null then
        perform private.count_refusal(source);
        return query select jsonb_build_object('outcome', 'refused');
        return;
    end if;
    return query select jsonb_build_object('outcome', 'granted', 'claims',
                                           claims || jsonb_build_object('aud', 'authenticated', 'iat', issued));
end
$$;

-- Takes a pod's one-time token and ties the pod to the session secret that its agent made. Whoever comes second with
-- another secret is refused, and the audit log has it.
create function public.redeem_bootstrap(hash text, session_hash text, source text default '') returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    wait int := private.must_wait(left(source, 200));
    held ledger.worker;
begin
    select * into held from ledger.worker w where w.bootstrap_hash = hash for update;
    if held.id is not null and held.status <> 'terminated'
       and coalesce(held.session_hash, redeem_bootstrap.session_hash) = redeem_bootstrap.session_hash
       and not exists (select from ledger.worker o
                       where o.session_hash = redeem_bootstrap.session_hash and o.bootstrap_hash <> hash) then
        update ledger.worker w set session_hash = redeem_bootstrap.session_hash
        where w.bootstrap_hash = hash and w.session_hash is null;
        return query select jsonb_build_object('outcome', 'redeemed', 'worker_id', held.id, 'organization_id', held.organization_id);
        return;
    end if;
    if wait is not null then
        return query select jsonb_build_object('outcome', 'limited', 'retry_after', wait);
        return;
    end if;
    if held.id is not null then
        insert into ledger.audit_log (organization_id, actor, action, subject)
        values (held.organization_id, jsonb_build_object('worker_id', held.id), 'replay_bootstrap', held.id);
    end if;
    perform private.count_refusal(source);
    return query select jsonb_build_object('outcome', 'refused');
end
$$;

-- The audit log -------------------------------------------------------------------------------

create function public.list_audit(max_rows int default 100, before_id bigint default null) returns setof jsonb
language plpgsql stable security definer
set search_path = ''
as $$
begin
    perform private.require_admin();
    return query
        select to_jsonb(a) - 'organization_id' from ledger.audit_log a
        where a.organization_id = private.my_org() and (before_id is null or a.id < before_id)
        order by a.id desc
        limit max_rows;
end
$$;
