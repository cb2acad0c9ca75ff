-- Keys in levels: the root key seals the keyring, whose keys seal one key for each version of each scope's key, and that
-- one its values.
CREATE TABLE keyring (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  root_key_id TEXT NOT NULL,
  record BLOB NOT NULL
) STRICT;

-- Sealed, each under the store key that its record states. Times are Unix milliseconds.
CREATE TABLE scope_keys (
  scope_id INTEGER NOT NULL REFERENCES scopes (id) ON DELETE CASCADE,
  version INTEGER NOT NULL,
  created_ms INTEGER NOT NULL,
  record BLOB NOT NULL,
  PRIMARY KEY (scope_id, version)
) STRICT, WITHOUT ROWID;

-- Which version of the scope's key opens a record. 0: none, the record is of the first format.
ALTER TABLE versions ADD COLUMN key_version INTEGER NOT NULL DEFAULT 0;

-- Under which version of its key a token's MAC is. 0: that of the first format.
ALTER TABLE tokens ADD COLUMN mac_version INTEGER NOT NULL DEFAULT 0;

-- A row says that what is sealed here is of the first format still (secrets_service/first_format.py), and holds what its
-- root key is known by.
CREATE TABLE first_format (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  key_check BLOB NOT NULL
) STRICT;
INSERT INTO first_format (one, key_check) SELECT 1, key_check FROM platform;
ALTER TABLE platform DROP COLUMN key_check;
