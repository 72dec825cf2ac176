"""What a configuration cannot be, and how a mistake is told."""
