-- The journal: everything BigChat told, what became of it, and what is known of either side.
--
-- Times that BigChat tells are whole Unix seconds by its clock. Times of this machine's clock (kept_at, settled_at,
-- due_at, next_at, the throttles) are Unix milliseconds.

-- Reading BigChat: one row.
CREATE TABLE source (
    id           INTEGER PRIMARY KEY CHECK (id = 1),
    cursor       INTEGER,                       -- up to which BigChat was read
    window_start INTEGER,                       -- of the poll under way; NULL: none is
    window_end   INTEGER,
    next_query   TEXT,                          -- its next page; NULL: its last page is kept
    CHECK ((window_start IS NULL) = (window_end IS NULL)),
    CHECK (next_query IS NULL OR window_start IS NOT NULL)
) STRICT;
INSERT INTO source (id) VALUES (1);

-- BigChat's runs, from one restart to the next: after a restart, ids mean other conversations and advisors.
CREATE TABLE epochs (
    id       INTEGER PRIMARY KEY,
    began_at INTEGER NOT NULL
) STRICT;
INSERT INTO epochs (id, began_at) VALUES (1, 0);

-- The pages of the poll under way, as they came. Their events are admitted once it is known which run told them; the
-- pages stay until all of them are, since an equal message on a later page is told apart by the earlier one.
CREATE TABLE pages (
    id           INTEGER PRIMARY KEY,
    query        TEXT NOT NULL,
    again_of     INTEGER REFERENCES pages (id), -- the page this one is, asked for again
    served_at    INTEGER NOT NULL,              -- by BigChat's clock
    window_start INTEGER NOT NULL,
    body         TEXT NOT NULL,
    admitted     INTEGER NOT NULL DEFAULT 0 CHECK (admitted IN (0, 1))
) STRICT;

CREATE TABLE conversations (
    id               INTEGER PRIMARY KEY,
    epoch            INTEGER NOT NULL REFERENCES epochs (id),
    bigchat_id       INTEGER NOT NULL,
    started_at       INTEGER,                   -- by its START or its details; NULL: neither is known
    first_advisor    INTEGER,                   -- BigChat's id; who had it when its details were first read
    details          TEXT NOT NULL DEFAULT 'unread' CHECK (details IN ('unread', 'read', 'gone')),
    -- what its delivered events say
    ended_at         INTEGER,
    transfer_at      INTEGER,
    transfer_event   INTEGER,
    transfer_advisor INTEGER,
    -- what OurAPI holds, as far as is known
    external_id      TEXT,                      -- once chosen
    chat_id          TEXT,                      -- NULL: no chat yet
    chat_started_at  INTEGER,                   -- also while its creation is under way
    chat_ended_at    INTEGER,
    chat_agent       TEXT,
    chat_unsure      INTEGER NOT NULL DEFAULT 0 CHECK (chat_unsure IN (0, 1)), -- a change's outcome is unknown
    chat_seen        INTEGER NOT NULL DEFAULT 0, -- how many losses of OurAPI there had been when it was last seen there
    looked_up        INTEGER NOT NULL DEFAULT 0, -- the session in which its messages were last looked up; -1: found, not created
    -- when there is something to do, and who does it
    due_at           INTEGER,                   -- NULL: nothing waits, or it is claimed
    claimed_through  INTEGER,                   -- the last event of the claim; NULL: it is not claimed
    UNIQUE (epoch, bigchat_id),
    CHECK (due_at IS NULL OR claimed_through IS NULL)
) STRICT;
CREATE INDEX conversations_due ON conversations (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX conversations_claimed ON conversations (id) WHERE claimed_through IS NOT NULL;
CREATE INDEX conversations_by_bigchat_id ON conversations (bigchat_id);
CREATE INDEX conversations_by_chat_seen ON conversations (chat_seen) WHERE external_id IS NOT NULL;

CREATE TABLE events (
    id           INTEGER PRIMARY KEY AUTOINCREMENT, -- in order of arrival, never given twice
    conversation INTEGER REFERENCES conversations (id), -- NULL: it could not be understood
    name         TEXT NOT NULL CHECK (name IN ('START', 'END', 'MESSAGE', 'TRANSFER', 'UNREADABLE')),
    event_at     INTEGER NOT NULL,
    data         TEXT,                          -- canonical JSON; of what could not be understood, all of it, raw
    digest       INTEGER NOT NULL,              -- of name, time and data
    state        TEXT NOT NULL CHECK (state IN ('waiting', 'delivered', 'failed', 'discarded')),
    kept_at      INTEGER NOT NULL,
    settled_at   INTEGER,
    CHECK ((conversation IS NULL) = (name = 'UNREADABLE')),
    CHECK ((state = 'waiting') = (settled_at IS NULL))
) STRICT;
CREATE INDEX events_identity ON events (conversation, digest);
CREATE INDEX events_waiting ON events (conversation, id) WHERE state = 'waiting';
CREATE INDEX events_failed ON events (id) WHERE state = 'failed';
CREATE INDEX events_done ON events (settled_at) WHERE state IN ('delivered', 'discarded');

-- Events that have failed at least once.
CREATE TABLE attempts (
    event     INTEGER PRIMARY KEY REFERENCES events (id) ON DELETE CASCADE,
    tries     INTEGER NOT NULL DEFAULT 0,       -- all failures, for the back-off
    counted   INTEGER NOT NULL DEFAULT 0,       -- those while others got through
    next_at   INTEGER,
    successes INTEGER,                          -- how many writes had succeeded at the last failure
    in_doubt  INTEGER NOT NULL DEFAULT 0 CHECK (in_doubt IN (0, 1)), -- it may have been carried out
    reason    TEXT,
    request   TEXT,
    response  TEXT
) STRICT;

CREATE TABLE advisors (
    epoch      INTEGER NOT NULL REFERENCES epochs (id),
    bigchat_id INTEGER NOT NULL,
    name       TEXT,                            -- NULL: BigChat no longer knows it
    email      TEXT,
    PRIMARY KEY (epoch, bigchat_id),
    CHECK ((name IS NULL) = (email IS NULL))
) STRICT, WITHOUT ROWID;

-- Which agent an e-mail address is.
CREATE TABLE agents (
    email    TEXT PRIMARY KEY,
    agent_id TEXT                               -- NULL: OurAPI refuses it for good
) STRICT, WITHOUT ROWID;

-- Messages that OurAPI was found to hold and that no journalled event accounts for yet.
CREATE TABLE found (
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    sent_at      INTEGER NOT NULL,
    text         TEXT NOT NULL,
    count        INTEGER NOT NULL CHECK (count > 0),
    PRIMARY KEY (conversation, sent_at, text)
) STRICT, WITHOUT ROWID;

-- Delivery as a whole: one row.
CREATE TABLE delivery (
    id                INTEGER PRIMARY KEY CHECK (id = 1),
    session           INTEGER NOT NULL DEFAULT 0, -- how often the daemon has started
    successes         INTEGER NOT NULL DEFAULT 0, -- how many writes have succeeded
    losses            INTEGER NOT NULL DEFAULT 0, -- how often OurAPI was found to have lost something
    bigchat_throttled INTEGER NOT NULL DEFAULT 0, -- until when an API asked to be left alone
    our_api_throttled INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO delivery (id) VALUES (1);
