-- Who used the endpoints whose usage is tracked, in each minute.
CREATE TABLE usage (
  endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
  minute INTEGER NOT NULL,       -- Unix minutes
  entity TEXT NOT NULL,          -- empty when none had been chosen
  principal_id TEXT NOT NULL,
  requester TEXT NOT NULL,       -- the principal's name when it asked last
  requests INTEGER NOT NULL,
  refused INTEGER NOT NULL,      -- answered 400 to 499
  failed INTEGER NOT NULL,       -- answered 500 or more
  input_tokens INTEGER NOT NULL,
  output_tokens INTEGER NOT NULL,
  PRIMARY KEY (endpoint_id, minute, entity, principal_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_by_age ON usage (minute);
