-- Who resolved a failed event, as far as it could be known; NULL: before this was recorded.
ALTER TABLE decisions ADD COLUMN user TEXT;
