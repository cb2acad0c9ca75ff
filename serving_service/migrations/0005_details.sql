-- What callers say about an endpoint beside its configuration, as they said it: JSON, or NULL when they said nothing.
ALTER TABLE endpoints ADD COLUMN ai_gateway TEXT;
ALTER TABLE endpoints ADD COLUMN email_notifications TEXT;
ALTER TABLE endpoints ADD COLUMN telemetry_config TEXT;
ALTER TABLE endpoints ADD COLUMN budget_policy_id TEXT NOT NULL DEFAULT '';
ALTER TABLE endpoints ADD COLUMN route_optimized INTEGER NOT NULL DEFAULT 0;
