"""History: the frame pool, its timelines, route tables and route planning."""
