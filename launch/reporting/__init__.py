"""What a run says: metrics.jsonl, the console, throughput."""
