"""Length-bucketed plans, samplers, shards and streams."""
