-- Client secrets of service principals are kept as tokens are, and are told apart by their kind: neither is ever taken
-- for the other.
ALTER TABLE tokens ADD COLUMN kind TEXT NOT NULL DEFAULT 'personal' CHECK (kind IN ('personal', 'client_secret'));
