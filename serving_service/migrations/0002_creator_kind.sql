-- What the creator is: User or ServicePrincipal.
ALTER TABLE endpoints ADD COLUMN creator_kind TEXT NOT NULL DEFAULT 'User';
