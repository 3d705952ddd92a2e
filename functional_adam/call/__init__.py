"""The pipeline of an update: read, plan, run, write."""
