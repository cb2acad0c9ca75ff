-- What a key service answered when it encrypted the root key, for it to be decrypted again; NULL where the root key comes
-- from a source that keeps it.
ALTER TABLE keyring ADD COLUMN wrapped BLOB;

-- How many puts the scope had when the key was made: with those of now, how often the key was used.
ALTER TABLE scope_keys ADD COLUMN puts_before INTEGER NOT NULL DEFAULT 0;
