"""What a run records: metrics, TensorBoard events, routing probes, alarms and the final report."""
