-- Every row that decides about rights is authenticated, with the lists that belong to it (secrets_service/integrity.py).
-- A row without a MAC is damaged, but in a store that is older than this; the keyring says which it is.
ALTER TABLE principals ADD COLUMN mac BLOB;
ALTER TABLE accounts ADD COLUMN mac BLOB;
ALTER TABLE scopes ADD COLUMN mac BLOB;
ALTER TABLE scopes ADD COLUMN generation INTEGER NOT NULL DEFAULT 0; -- counts the changes of the access control list
ALTER TABLE endpoints ADD COLUMN mac BLOB;
ALTER TABLE platform ADD COLUMN mac BLOB;
-- `mac` is that of the token itself.
ALTER TABLE tokens ADD COLUMN row_mac BLOB;
