-- A window continues until its pages end, and its time is stored.

-- How many polls of the unfinished window have used up their page budget without a new event.
ALTER TABLE poll_state RENAME COLUMN rescans_left TO idle_polls;
UPDATE poll_state SET idle_polls = 0;
