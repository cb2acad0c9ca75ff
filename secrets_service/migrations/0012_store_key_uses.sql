-- How often each store key has sealed, as of the last time that somebody wrote it down.
CREATE TABLE store_key_uses (
  version INTEGER PRIMARY KEY,
  uses INTEGER NOT NULL
) STRICT;
