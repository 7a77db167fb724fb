-- The waiting time of a retried event begins with the retry, not with its receipt.

ALTER TABLE attempts ADD COLUMN retried_at INTEGER; -- when the waiting event was last retried; NULL: it was not
CREATE INDEX attempts_retried ON attempts (conversation, retried_at) WHERE retried_at IS NOT NULL;

UPDATE attempts SET retried_at =
    (SELECT max(resolved_at) FROM resolutions WHERE event = attempts.event AND resolution = 'retry')
WHERE event IN (SELECT event FROM redeliveries WHERE NOT restored);
