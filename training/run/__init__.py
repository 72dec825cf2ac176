"""The folder of a run: checkpoints, metrics, logs, and how far it is."""
