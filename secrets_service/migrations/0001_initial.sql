-- What the first start decided, in one row.
CREATE TABLE platform (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  store_id BLOB NOT NULL,
  workspace_id TEXT NOT NULL,
  key_check BLOB NOT NULL,
  admin_id INTEGER NOT NULL REFERENCES principals (id),
  admin_token_id TEXT NOT NULL -- no foreign key: that token may expire or be deleted like any other
) STRICT;

-- The keys that assertions are signed with, sealed. The newest signs.
CREATE TABLE signing_keys (
  id INTEGER PRIMARY KEY,
  key_id TEXT NOT NULL UNIQUE,
  record BLOB NOT NULL
) STRICT;

-- Whom a permission can be granted to. Users and groups share one name space, because ACLs name both in one field.
-- AUTOINCREMENT: an id is never given again, so nothing that outlives a principal falls to another.
CREATE TABLE principals (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL CHECK (kind IN ('user', 'group')),
  name TEXT NOT NULL,
  folded TEXT NOT NULL UNIQUE
) STRICT;

CREATE TABLE users (
  id INTEGER PRIMARY KEY REFERENCES principals (id) ON DELETE CASCADE,
  display_name TEXT NOT NULL,
  given_name TEXT NOT NULL,
  family_name TEXT NOT NULL,
  emails TEXT NOT NULL, -- JSON: [[type, value, primary], ...]
  is_active INTEGER NOT NULL,
  external_id TEXT NOT NULL
) STRICT;

CREATE TABLE memberships (
  member_id INTEGER NOT NULL REFERENCES principals (id) ON DELETE CASCADE,
  group_id INTEGER NOT NULL REFERENCES principals (id) ON DELETE CASCADE,
  PRIMARY KEY (member_id, group_id)
) STRICT, WITHOUT ROWID;

-- Of a token only its public id and a MAC are kept. Times are Unix milliseconds.
CREATE TABLE tokens (
  id TEXT PRIMARY KEY,
  owner_id INTEGER NOT NULL REFERENCES principals (id) ON DELETE CASCADE,
  mac BLOB NOT NULL,
  comment TEXT NOT NULL,
  created_ms INTEGER NOT NULL,
  expires_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX tokens_by_owner ON tokens (owner_id, created_ms);

-- `folded` is what is looked up, `name` what is shown. `last_version` counts the puts of a scope: a version is bound into
-- the ciphertext and never comes twice, also when a key is deleted and put again.
CREATE TABLE scopes (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  uuid BLOB NOT NULL UNIQUE,
  name TEXT NOT NULL,
  folded TEXT NOT NULL UNIQUE,
  last_version INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE secrets (
  id INTEGER PRIMARY KEY,
  scope_id INTEGER NOT NULL REFERENCES scopes (id) ON DELETE CASCADE,
  key TEXT NOT NULL,
  folded TEXT NOT NULL,
  version INTEGER NOT NULL,
  record BLOB NOT NULL,
  updated_ms INTEGER NOT NULL,
  UNIQUE (scope_id, folded)
) STRICT;

-- In the order of their ids: the order in which they were first granted.
CREATE TABLE acls (
  id INTEGER PRIMARY KEY,
  scope_id INTEGER NOT NULL REFERENCES scopes (id) ON DELETE CASCADE,
  principal_id INTEGER NOT NULL REFERENCES principals (id) ON DELETE CASCADE,
  permission INTEGER NOT NULL CHECK (permission BETWEEN 1 AND 3),
  UNIQUE (scope_id, principal_id)
) STRICT;
CREATE INDEX acls_by_principal ON acls (principal_id);

-- Principal ids have sixteen digits, as clients are used to.
INSERT INTO sqlite_sequence (name, seq) VALUES ('principals', 1000000000000000);
