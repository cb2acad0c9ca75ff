-- A key of a scope, for ever: when it is deleted, the row stays and counts on, since clients rotate by delete and put.
-- Versions below `first_version` were put before the last deletion; the key exists while `last_version`, which is the
-- version that is read, is not one of them.
CREATE TABLE keys (
  id INTEGER PRIMARY KEY,
  scope_id INTEGER NOT NULL REFERENCES scopes (id) ON DELETE CASCADE,
  key TEXT NOT NULL,
  folded TEXT NOT NULL,
  first_version INTEGER NOT NULL,
  last_version INTEGER NOT NULL,
  UNIQUE (scope_id, folded)
) STRICT;

-- The values that are kept, sealed. A version is bound into its record. Times are Unix milliseconds.
CREATE TABLE versions (
  key_id INTEGER NOT NULL REFERENCES keys (id) ON DELETE CASCADE,
  version INTEGER NOT NULL,
  created_ms INTEGER NOT NULL, -- before the record, whose pages a list then need not read
  record BLOB NOT NULL,
  PRIMARY KEY (key_id, version)
) STRICT;

-- Which replicas were started with which versions and have not ended.
CREATE TABLE holds (
  replica_id TEXT NOT NULL,
  key_id INTEGER NOT NULL,
  version INTEGER NOT NULL,
  PRIMARY KEY (replica_id, key_id, version),
  FOREIGN KEY (key_id, version) REFERENCES versions (key_id, version) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX holds_by_version ON holds (key_id, version);

INSERT INTO keys (id, scope_id, key, folded, first_version, last_version)
  SELECT id, scope_id, key, folded, version, version FROM secrets;
INSERT INTO versions (key_id, version, created_ms, record) SELECT id, version, updated_ms, record FROM secrets;
DROP TABLE secrets;
ALTER TABLE scopes DROP COLUMN last_version;
