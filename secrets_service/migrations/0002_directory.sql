-- Service principals: a third kind of principal. A CHECK is replaced by replacing its column.
ALTER TABLE principals ADD COLUMN kind_of_three TEXT NOT NULL DEFAULT 'user'
  CHECK (kind_of_three IN ('user', 'group', 'service_principal'));
UPDATE principals SET kind_of_three = kind;
ALTER TABLE principals DROP COLUMN kind;
ALTER TABLE principals RENAME COLUMN kind_of_three TO kind;
CREATE INDEX principals_by_kind ON principals (kind, id);

-- What every kind of principal has. JSON: lists of texts.
ALTER TABLE principals ADD COLUMN external_id TEXT NOT NULL DEFAULT '';
ALTER TABLE principals ADD COLUMN roles TEXT NOT NULL DEFAULT '[]';
ALTER TABLE principals ADD COLUMN entitlements TEXT NOT NULL DEFAULT '[]';
UPDATE principals SET external_id = users.external_id, entitlements = '["workspace-access"]'
  FROM users WHERE users.id = principals.id;
ALTER TABLE users DROP COLUMN external_id;

-- Users and service principals: who can own tokens.
ALTER TABLE users RENAME TO accounts;

CREATE INDEX memberships_by_group ON memberships (group_id, member_id);

-- Who made a token: its owner or an admin, who may be gone since.
ALTER TABLE tokens ADD COLUMN creator_id INTEGER NOT NULL DEFAULT 0;
UPDATE tokens SET creator_id = owner_id;
CREATE INDEX tokens_by_creator ON tokens (creator_id, created_ms);
CREATE INDEX tokens_by_age ON tokens (created_ms);
