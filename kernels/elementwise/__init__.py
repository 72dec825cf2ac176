"""What stands between the matrix products, each direction one kernel."""
