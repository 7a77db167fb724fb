-- What whoever runs it wants to see: status, console and metrics, whether or not the daemon runs.

-- How each API was when the daemon last asked it.
CREATE TABLE apis (
    name     TEXT PRIMARY KEY CHECK (name IN ('bigchat', 'our_api')),
    up       INTEGER CHECK (up IN (0, 1)),      -- NULL: not known yet
    since    INTEGER NOT NULL,                  -- Unix ms; up or down since then
    asked_at INTEGER NOT NULL,                  -- Unix ms; the latest exchange
    request  TEXT NOT NULL,
    response TEXT NOT NULL,
    trouble  TEXT,                              -- while it is down: why
    CHECK (trouble IS NULL OR up = 0)
) STRICT, WITHOUT ROWID;

ALTER TABLE source ADD COLUMN polled_at INTEGER;    -- Unix ms; when a poll last came to its end
ALTER TABLE source ADD COLUMN clock_ahead INTEGER;  -- by how many seconds BigChat's clock was ahead of this machine's then
ALTER TABLE source ADD COLUMN newest_event INTEGER; -- the latest event_at ever told

-- What happened in each minute of this machine's clock (Unix seconds / 60), for as long as a chart may want it.
CREATE TABLE minutes (
    minute    INTEGER NOT NULL,
    kind      TEXT NOT NULL,
    told      INTEGER NOT NULL DEFAULT 0,
    delivered INTEGER NOT NULL DEFAULT 0,
    failed    INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (minute, kind)
) STRICT, WITHOUT ROWID;

-- What somebody decided about failed events: kept for good.
CREATE TABLE decisions (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    decided_at   INTEGER NOT NULL,                  -- Unix ms
    decided_by   TEXT NOT NULL CHECK (decided_by IN ('command', 'console')),
    decision     TEXT NOT NULL CHECK (decision IN ('retry', 'discard')),
    event        INTEGER NOT NULL,                  -- which the retention may have dropped since
    conversation INTEGER,                           -- BigChat's id; NULL: the event could not be understood
    kind         TEXT NOT NULL,
    reason       TEXT NOT NULL                      -- why it had failed
) STRICT;
CREATE INDEX decisions_by_event ON decisions (event);

-- The latest failures of each event that has failed, by how often it had failed by then.
CREATE TABLE failures (
    event     INTEGER NOT NULL REFERENCES events (id) ON DELETE CASCADE,
    number    INTEGER NOT NULL,
    failed_at INTEGER NOT NULL,                     -- Unix ms
    reason    TEXT NOT NULL,
    request   TEXT NOT NULL,
    response  TEXT NOT NULL,
    PRIMARY KEY (event, number)
) STRICT, WITHOUT ROWID;

-- What it took to deliver an event; NULL: not delivered yet, or before this was kept.
ALTER TABLE events ADD COLUMN sent TEXT CHECK (sent IN ('chat created', 'chat changed', 'message added', 'nothing'));

CREATE INDEX conversations_by_chat ON conversations (chat_id) WHERE chat_id IS NOT NULL;
CREATE INDEX conversations_by_agent ON conversations (chat_agent) WHERE chat_agent IS NOT NULL;
CREATE INDEX events_failed_of ON events (conversation) WHERE state = 'failed';
