"""Checkpoints: written whole, read only if sound, and found again by runs that go on."""
