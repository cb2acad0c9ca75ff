-- Rate limits in the older spelling, as they were given: a JSON list. Those of the AI gateway stand in `ai_gateway`.
ALTER TABLE endpoints ADD COLUMN rate_limits TEXT NOT NULL DEFAULT '[]';
