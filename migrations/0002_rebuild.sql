-- What `bigchat-sync rebuild` asks for. Whoever delivers does it: the daemon, or the command itself where none runs.
CREATE TABLE rebuilds (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    asked_at   INTEGER NOT NULL,
    dry_run    INTEGER NOT NULL CHECK (dry_run IN (0, 1)), -- look, and change nothing
    last_event INTEGER NOT NULL                            -- the latest event there was: later ones are none of its business
) STRICT;

-- The conversations whose chats are to be compared with the journal.
CREATE TABLE checks (
    rebuild      INTEGER NOT NULL REFERENCES rebuilds (id) ON DELETE CASCADE,
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    chat         TEXT CHECK (chat IN ('there', 'differs', 'missing')), -- as it was found; NULL: not compared yet
    messages     INTEGER,                                              -- how many messages were missing
    tries        INTEGER NOT NULL DEFAULT 0,                           -- how often that failed
    PRIMARY KEY (rebuild, conversation),
    CHECK ((chat IS NULL) = (messages IS NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX checks_pending ON checks (rebuild, conversation) WHERE chat IS NULL;

-- In how many polls a window that is read again, since one of its pages could not be had, may still bring nothing new.
ALTER TABLE source ADD COLUMN rereading INTEGER NOT NULL DEFAULT 0;

-- How long OurAPI's answers took at the worst of late, in ms, where that is long: what was on its way when the daemon died
-- may be under way for as long.
ALTER TABLE delivery ADD COLUMN slowest INTEGER NOT NULL DEFAULT 0;

-- The latest run of BigChat that was known of when a page was kept: it is of that one or a later one.
ALTER TABLE pages ADD COLUMN kept_in INTEGER NOT NULL DEFAULT 1;

-- Until when requests that nobody waits for any more may be under way to OurAPI.
ALTER TABLE delivery ADD COLUMN late INTEGER NOT NULL DEFAULT 0;
