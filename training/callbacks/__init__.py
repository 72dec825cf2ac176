"""What happens beside a run's optimizer steps, one callback a file."""
