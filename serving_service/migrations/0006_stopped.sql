-- Whether the active configuration is not to run; a deployment that succeeds takes that back.
ALTER TABLE endpoints ADD COLUMN is_stopped INTEGER NOT NULL DEFAULT 0;
