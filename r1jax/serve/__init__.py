"""What leaves the system: reports as JSON and XML."""
