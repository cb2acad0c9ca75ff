-- Serving's endpoints, as far as rights are concerned. A row outlives its endpoint, so that nothing is ever granted on its
-- id again. `creator_id` is no foreign key: the creator may go, and its id is never given again.
CREATE TABLE endpoints (
  id TEXT PRIMARY KEY,
  creator_id INTEGER NOT NULL,
  is_inherited INTEGER NOT NULL, -- made before there were grants: it gets its first ones with its launches
  is_deleted INTEGER NOT NULL DEFAULT 0
) STRICT;

-- In the order of their ids: the order in which they were first granted. 1: CAN_VIEW, 2: CAN_QUERY, 3: CAN_MANAGE.
CREATE TABLE endpoint_permissions (
  id INTEGER PRIMARY KEY,
  endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
  principal_id INTEGER NOT NULL REFERENCES principals (id) ON DELETE CASCADE,
  level INTEGER NOT NULL CHECK (level BETWEEN 1 AND 3),
  UNIQUE (endpoint_id, principal_id)
) STRICT;
CREATE INDEX endpoint_permissions_by_principal ON endpoint_permissions (principal_id);

-- What may be launched with secrets: per configuration, what runs (a digest) and what it may refer to.
CREATE TABLE launch_grants (
  endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
  version INTEGER NOT NULL,
  digest BLOB NOT NULL,
  author_id INTEGER NOT NULL,
  refs TEXT NOT NULL, -- JSON: [[scope, key, uuid of the scope as hex], ...], names folded
  PRIMARY KEY (endpoint_id, version, digest)
) STRICT, WITHOUT ROWID;

-- Whether Serving has made known the endpoints of the time before grants. A new database has no such time.
ALTER TABLE platform ADD COLUMN knows_older_endpoints INTEGER NOT NULL DEFAULT 0;

-- What those who enforce rights have to be told. Triggers fill it, and whoever writes empties it in the same transaction,
-- so no statement can change a right and forget to say so. Without a key: the conflict clause of a statement would also
-- rule its triggers, and to say something twice does no harm.
CREATE TABLE access_changes (
  kind TEXT NOT NULL CHECK (kind IN ('endpoint', 'principal', 'token')),
  id TEXT NOT NULL
) STRICT;

CREATE TRIGGER token_gone AFTER DELETE ON tokens
  BEGIN INSERT INTO access_changes VALUES ('token', old.id); END;
CREATE TRIGGER account_changed AFTER UPDATE ON accounts
  BEGIN INSERT INTO access_changes VALUES ('principal', old.id); END;
CREATE TRIGGER account_gone AFTER DELETE ON accounts
  BEGIN INSERT INTO access_changes VALUES ('principal', old.id); END;
CREATE TRIGGER principal_renamed AFTER UPDATE OF name ON principals
  BEGIN INSERT INTO access_changes VALUES ('principal', old.id); END;
CREATE TRIGGER member_added AFTER INSERT ON memberships
  BEGIN INSERT INTO access_changes VALUES ('principal', new.member_id); END;
CREATE TRIGGER member_removed AFTER DELETE ON memberships
  BEGIN INSERT INTO access_changes VALUES ('principal', old.member_id); END;
CREATE TRIGGER endpoint_added AFTER INSERT ON endpoints
  BEGIN INSERT INTO access_changes VALUES ('endpoint', new.id); END;
CREATE TRIGGER endpoint_changed AFTER UPDATE ON endpoints
  BEGIN INSERT INTO access_changes VALUES ('endpoint', new.id); END;
CREATE TRIGGER permission_added AFTER INSERT ON endpoint_permissions
  BEGIN INSERT INTO access_changes VALUES ('endpoint', new.endpoint_id); END;
CREATE TRIGGER permission_changed AFTER UPDATE ON endpoint_permissions
  BEGIN INSERT INTO access_changes VALUES ('endpoint', new.endpoint_id); END;
CREATE TRIGGER permission_removed AFTER DELETE ON endpoint_permissions
  BEGIN INSERT INTO access_changes VALUES ('endpoint', old.endpoint_id); END;
