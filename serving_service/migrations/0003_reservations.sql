-- What is being granted by Secrets and not committed yet: a new endpoint, whose name is taken but which nobody sees, and
-- the next version of one that there is.
ALTER TABLE endpoints ADD COLUMN is_reserved INTEGER NOT NULL DEFAULT 0;
ALTER TABLE endpoints ADD COLUMN reserved_version INTEGER;
