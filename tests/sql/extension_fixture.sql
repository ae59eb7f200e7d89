-- The shapes of pg_trickle 0.28 as the extension leaves them, without the extension:
-- its catalog tables without our columns, an outbox whose deltas are spelled the
-- other way, its group functions under the names that we use elsewhere, an inbox.

create schema pgtrickle;

create table pgtrickle.pgt_outbox_config (
    stream_table_oid oid primary key,
    stream_table_name text not null,
    outbox_table_name text not null,
    retention_hours integer not null default 24,
    enabled_at timestamptz not null default now(),
    last_drained_at timestamptz,
    last_drained_count bigint default 0
);

create table public.shipments (id bigint primary key, state text);

create table pgtrickle.outbox_shipments (
    id bigserial primary key,
    pgt_id uuid not null,
    refresh_id uuid not null,
    created_at timestamptz not null default now(),
    inserted_count bigint not null default 0,
    deleted_count bigint not null default 0,
    is_claim_check boolean not null default false,
    payload jsonb
);

create table pgtrickle.outbox_delta_rows_shipments (
    outbox_id bigint not null,
    row_num bigint not null,
    op text not null,
    payload jsonb not null,
    primary key (outbox_id, row_num)
);

insert into pgtrickle.pgt_outbox_config (stream_table_oid, stream_table_name, outbox_table_name)
values ('public.shipments'::regclass::oid, 'shipments', 'outbox_shipments');

insert into pgtrickle.outbox_shipments (pgt_id, refresh_id, inserted_count, payload)
values (gen_random_uuid(), gen_random_uuid(), 1, '{"v": 1, "inserted": [{"id": 1, "state": "sent"}], "deleted": []}');

create table pgtrickle.pgt_consumer_groups (
    group_name text primary key,
    outbox_name text not null,
    auto_offset_reset text not null default 'latest',
    created_at timestamptz not null default now()
);

create table pgtrickle.pgt_consumer_offsets (
    group_name text not null references pgtrickle.pgt_consumer_groups (group_name) on delete cascade,
    consumer_id text not null,
    committed_offset bigint not null default 0,
    last_heartbeat_at timestamptz,
    primary key (group_name, consumer_id)
);

create table pgtrickle.pgt_consumer_leases (
    group_name text not null,
    consumer_id text not null,
    batch_start bigint not null,
    batch_end bigint not null,
    lease_expires_at timestamptz not null,
    primary key (group_name, consumer_id, batch_start)
);

create table pgtrickle.pgt_inbox_config (
    inbox_name text primary key,
    inbox_schema text not null default 'pgtrickle',
    max_retries integer not null default 5,
    schedule text not null default '1s',
    with_dead_letter boolean not null default true,
    with_stats boolean not null default true,
    retention_hours integer,
    created_at timestamptz not null default now()
);

create table pgtrickle.parcel_inbox (
    event_id text primary key,
    event_type text not null,
    source text,
    aggregate_id text,
    payload jsonb not null,
    received_at timestamptz not null default now(),
    processed_at timestamptz,
    error text,
    retry_count integer not null default 0,
    trace_id text
);

insert into pgtrickle.pgt_inbox_config (inbox_name) values ('parcel_inbox');

create function pgtrickle.enable_outbox(stream_table text, retention_hours integer default 24)
returns text language sql as $$ select 'the extension''s' $$;

create function pgtrickle.disable_outbox(stream_table text, if_exists boolean default false)
returns void language sql as $$ select $$;

create function pgtrickle.outbox_status(stream_table text)
returns jsonb language sql as $$ select '{"of": "the extension"}'::jsonb $$;

create function pgtrickle.outbox_rows_consumed(stream_table text, outbox_id bigint)
returns void language sql as $$
    delete from pgtrickle.outbox_delta_rows_shipments as d where d.outbox_id = outbox_rows_consumed.outbox_id
$$;

create function pgtrickle.create_consumer_group(name text, outbox text, auto_offset_reset text default 'latest')
returns void language sql as $$
    insert into pgtrickle.pgt_consumer_groups (group_name, outbox_name, auto_offset_reset) values ($1, $2, $3)
$$;

create function pgtrickle.poll_outbox(
    group_name text,
    consumer text,
    batch_size integer default 100,
    visibility_seconds integer default 30
)
returns table (
    outbox_id bigint,
    pgt_id uuid,
    created_at timestamptz,
    inserted_count bigint,
    deleted_count bigint,
    is_claim_check boolean,
    payload jsonb
)
language sql as $$
    select id, o.pgt_id, o.created_at, o.inserted_count, o.deleted_count, o.is_claim_check, o.payload
    from pgtrickle.outbox_shipments as o
    order by id
    limit batch_size
$$;

create function pgtrickle.commit_offset(group_name text, consumer text, last_offset bigint)
returns void language sql as $$ select $$;

create function pgtrickle.create_inbox(inbox_name text, schema text default 'pgtrickle')
returns void language sql as $$ select $$;
