"""Networks, gates, sizes and losses: arithmetic only."""
