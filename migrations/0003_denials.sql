-- A "no" of an API is believed once it was repeated.

-- How often BigChat has answered that it does not know a conversation or an advisor, and OurAPI that it does not accept
-- an advisor's agent. A usable answer deletes the row of an advisor or an agent. The rows of conversations and advisors
-- last until BigChat restarts.
CREATE TABLE denials (
    epoch      INTEGER NOT NULL REFERENCES epochs (id),
    what       TEXT NOT NULL,                    -- 'conversation', 'advisor' or 'agent'
    bigchat_id INTEGER NOT NULL,                 -- of the conversation or the advisor
    count      INTEGER NOT NULL,
    counted_at INTEGER NOT NULL,
    PRIMARY KEY (epoch, what, bigchat_id)
) STRICT, WITHOUT ROWID;

-- Those of earlier versions were believed.
INSERT INTO denials SELECT epoch, 'advisor', bigchat_id, 3, 0 FROM advisors
    WHERE name IS NULL AND epoch = (SELECT max(id) FROM epochs);
INSERT INTO denials SELECT v.epoch, 'agent', v.bigchat_id, 3, 0 FROM advisors v JOIN agents a ON a.email = v.email
    WHERE a.agent_id IS NULL;
