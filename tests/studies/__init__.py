"""Programs that measure or render the stored runs in tests/data, and their tests."""
