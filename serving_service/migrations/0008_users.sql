-- The user that the models of an endpoint run as, where each endpoint has one of its own. Nobody else gets it before the
-- endpoint's row is gone, and with it the last of its replicas.
CREATE TABLE users (
  uid INTEGER PRIMARY KEY,
  endpoint_id TEXT NOT NULL UNIQUE REFERENCES endpoints (id) ON DELETE CASCADE
) STRICT;
